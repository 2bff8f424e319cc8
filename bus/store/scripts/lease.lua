-- Take a lease that is free, or renew one's own. Guarantees: one holder at a time, until it
-- releases the lease or does not renew it in time.
--
-- KEYS  lease
-- ARGV  holder, ttl_ms
-- reply 1 held from now on | 0 somebody else holds it
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
