-- Keep leases alive. Guarantees: only the owner of the current term renews; what it does not own
-- any more is reported, and an older owner cannot take a request back. Where the queue entry
-- itself is gone (deleted by hand, Redis restored from an old copy) the keys get an expiry. A request
-- that its owner has ended meanwhile is not lost.
--
-- KEYS  prompts, then request and result for each claim
-- ARGV  group, edge, ttl_s, then entry id and term for each claim
-- reply {index of a lost claim (from 0), …}
local lost = {}
for i = 0, (#KEYS - 1) / 2 - 1 do
  local request, result = KEYS[2 + 2 * i], KEYS[3 + 2 * i]
  local entry, term = ARGV[4 + 2 * i], ARGV[5 + 2 * i]
  local known = redis.call('HMGET', request, 'term', 'state')
  if known[1] ~= term or (known[2] ~= 'running' and known[2] ~= 'done') then
    table.insert(lost, i)
  elseif known[2] == 'done' then
    -- ended by this very term: nothing to renew
  elseif #redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry, 'JUSTID') == 0 then
    table.insert(lost, i)
    redis.call('EXPIRE', request, ARGV[3])
    redis.call('EXPIRE', result, ARGV[3])
  end
end
return lost
