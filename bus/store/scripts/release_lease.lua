-- Give a lease back. Guarantees: nobody else's is taken away.
--
-- KEYS  lease
-- ARGV  holder
-- reply 1 given back | 0 it was not ours
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
