-- Delete hash fields that still hold what the caller read. Guarantees: a worker that wrote a new
-- heartbeat in between keeps it.
--
-- KEYS  hash
-- ARGV  field, value, field, value, …
-- reply number of fields deleted
local deleted = 0
for i = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then
    deleted = deleted + redis.call('HDEL', KEYS[1], ARGV[i])
  end
end
return deleted
