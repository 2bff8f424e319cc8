-- End a request. Guarantees: only the owner of the current term ends it; the end entry, the state
-- and the removal from the queue happen together or not at all; a repeat changes nothing. With a
-- reason it is a burial: the request's fields go to the dead letters as well.
--
-- KEYS  prompts, request, result, cancel, dead
-- ARGV  group, request id, entry id, term, ttl_s, finish_reason, error, usage, burial reason or '',
--       limit of the dead letters
-- reply 1 ended | 0 not ours (any more)
local prompts, request, result, cancel, dead = unpack(KEYS)
local group, id, entry, term, ttl = unpack(ARGV, 1, 5)
local known = redis.call('HMGET', request, 'term', 'state')
if known[1] ~= term then return 0 end
if known[2] == 'done' then return 1 end
if known[2] ~= 'running' then return 0 end
if ARGV[9] ~= '' then
  local found = redis.call('XRANGE', prompts, entry, entry)
  local letter = #found > 0 and found[1][2] or {}
  -- Last, since readers keep the last of equal names: a request may carry an `id` of its own.
  for _, value in ipairs({'id', id, 'reason', ARGV[9]}) do table.insert(letter, value) end
  redis.call('XADD', dead, 'MAXLEN', '~', ARGV[10], '*', unpack(letter))
end
redis.call('XADD', result, '*', 'kind', 'end', 'finish_reason', ARGV[6], 'error', ARGV[7],
  'usage', ARGV[8], 'term', term)
redis.call('HSET', request, 'state', 'done')
redis.call('EXPIRE', request, ttl)
redis.call('EXPIRE', result, ttl)
redis.call('XACK', prompts, group, entry)
redis.call('XDEL', prompts, entry)
redis.call('DEL', cancel)
return 1
