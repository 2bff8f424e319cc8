-- Hand a request back at once. Guarantees: the delivery is not counted; any edge can claim the
-- request right away (its entry looks idle for eleven days); the term rises, so a late append of
-- the old owner is refused; a repeat changes nothing.
--
-- KEYS  prompts, request
-- ARGV  group, entry id, term
-- reply 1 released | 0 not ours (any more)
local known = redis.call('HMGET', KEYS[2], 'term', 'state', 'owner')
if known[1] ~= ARGV[3] or known[2] ~= 'running' then return 0 end
redis.call('HINCRBY', KEYS[2], 'term', 1)
redis.call('HINCRBY', KEYS[2], 'deliveries', -1)
redis.call('HSET', KEYS[2], 'owner', '', 'state', 'queued')
redis.call('XCLAIM', KEYS[1], ARGV[1], known[3], 0, ARGV[2], 'IDLE', 1000000000, 'JUSTID')
return 1
