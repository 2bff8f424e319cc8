-- Store a session's control state. Guarantees: only a newer (term, version) replaces what is
-- there, all fields together. The same (term, version) is stored again: only one controller has that
-- term, and a session that moves to another cloud worker keeps its version.
--
-- KEYS  session
-- ARGV  ttl_s, term, version, field, value, …
-- reply 1 stored (or there already) | 0 something newer is there
local known = redis.call('HMGET', KEYS[1], 'term', 'version')
if known[1] and known[2] then
  local term, version = tonumber(ARGV[2]), tonumber(ARGV[3])
  local old_term, old_version = tonumber(known[1]), tonumber(known[2])
  if term < old_term or (term == old_term and version < old_version) then return 0 end
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
