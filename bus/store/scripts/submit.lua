-- Add a request to the queue. Guarantees: the queue never grows beyond its limit and is never
-- trimmed; an id is used once while its request or result exists; a repeat of the same call
-- (same nonce, because the reply was lost) adds nothing and answers as the first one did.
--
-- KEYS  prompts, request
-- ARGV  max_queue, nonce, seed, field, value, field, value, …
-- reply {'ok', entry id} | {'full', length} | {'duplicate', state}
local prompts, request = KEYS[1], KEYS[2]
local known = redis.call('HMGET', request, 'nonce', 'entry', 'state')
if known[2] then
  if known[1] == ARGV[2] then return {'ok', known[2]} end
  return {'duplicate', known[3]}
end
local length = redis.call('XLEN', prompts)
if length >= tonumber(ARGV[1]) then return {'full', length} end
local entry = redis.call('XADD', prompts, '*', unpack(ARGV, 4))
redis.call('HSET', request, 'nonce', ARGV[2], 'seed', ARGV[3], 'entry', entry,
  'state', 'queued', 'term', 0, 'next', 0, 'deliveries', 0)
return {'ok', entry}
