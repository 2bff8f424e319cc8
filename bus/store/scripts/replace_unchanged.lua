-- Set a key that still holds what the caller read. Guarantees: of two who read the same, one wins
-- and the other is told.
--
-- KEYS  key
-- ARGV  what was read (empty: nothing), what it shall hold
-- reply 1 set | 0 it holds something else
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
