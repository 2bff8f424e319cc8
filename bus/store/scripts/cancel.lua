-- Cancel a request. Guarantees: one that no edge owns ends here and now, together with its
-- removal from the queue; one that runs, or that is not known yet because it came by a plain
-- XADD, gets a mark which its edge looks for; one that has ended stays as it is.
--
-- KEYS  prompts, request, result, cancel
-- ARGV  group, ttl_s
-- reply 1 cancelled or marked | 0 it has ended already
local prompts, request, result, cancel = unpack(KEYS)
local known = redis.call('HMGET', request, 'state', 'entry', 'term', 'next')
if known[1] == 'done' then return 0 end
if known[1] ~= 'queued' then
  redis.call('SET', cancel, 1, 'EX', ARGV[2])
  return 1
end
redis.call('XADD', result, '*', 'kind', 'end', 'finish_reason', 'cancelled', 'error', '',
  'usage', '{"completion_tokens":' .. known[4] .. '}', 'term', known[3])
redis.call('HSET', request, 'state', 'done')
redis.call('EXPIRE', request, ARGV[2])
redis.call('EXPIRE', result, ARGV[2])
redis.call('XACK', prompts, ARGV[1], known[2])
redis.call('XDEL', prompts, known[2])
return 1
