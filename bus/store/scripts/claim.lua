-- Make `edge` the owner of a request. Guarantees: the term rises with every claim, so whoever
-- owned the request before can write nothing from here on; `next` is what the result stream
-- really holds; a request that ended meanwhile is taken off the queue instead of being run again;
-- a delivery is counted here and nowhere else, so a lost XREADGROUP reply costs none.
--
-- The entry named is one that XREADGROUP has just given to `edge`; without one, the first entry is
-- taken whose owner has been silent for longer than the lease. The request's keys follow from the
-- entry, so they are built here: this needs one Redis, not a cluster.
--
-- KEYS  prompts
-- ARGV  key prefix, group, edge, lease_ms, max_deliveries, entry id or ''
-- reply false: nothing to claim
--       {entry id, {field, value, …}, request id, id taken (0/1), term, deliveries, given up (0/1),
--        {result entry, …}}
local prompts = KEYS[1]
local prefix, group, edge = ARGV[1], ARGV[2], ARGV[3]
local lease_ms, max_deliveries = ARGV[4], tonumber(ARGV[5])

local function value_of(fields, name)
  local value = false
  for i = 1, #fields, 2 do
    if fields[i] == name then value = fields[i + 1] end
  end
  return value
end

-- The request's id, and whether the id asked for belongs to another request already. Mirrors
-- bus/protocol/requests.py, which says what is wrong with a bad id; here a bad one is just not used.
local function identify(entry, fields)
  local asked = value_of(fields, 'id')
  if not asked or #asked > 64 or not string.find(asked, '^[A-Za-z0-9_.:%-]+$') then
    return entry, 0
  end
  if asked ~= entry and string.find(asked, '^[0-9]+%-[0-9]+$') then return entry, 0 end
  local other = redis.call('HGET', prefix .. 'request:' .. asked, 'entry')
  if other and other ~= entry then return entry, 1 end
  return asked, 0
end

local function remove(entry)
  redis.call('XACK', prompts, group, entry)
  redis.call('XDEL', prompts, entry)
end

local function claim(entry)
  local pending = redis.call('XPENDING', prompts, group, entry, entry, 1)
  if #pending == 0 or pending[1][2] ~= edge then return false end
  local found = redis.call('XRANGE', prompts, entry, entry)
  if #found == 0 then
    remove(entry)
    return false
  end
  local fields = found[1][2]
  local id, taken = identify(entry, fields)
  local request, result = prefix .. 'request:' .. id, prefix .. 'result:' .. id
  local streamed = redis.call('XRANGE', result, '-', '+')
  local next, term = 0, tonumber(redis.call('HGET', request, 'term') or 0)
  if #streamed > 0 then
    local last = streamed[#streamed][2]
    if value_of(last, 'kind') == 'end' then
      remove(entry)
      return false
    end
    if value_of(last, 'kind') == 'tokens' then
      next = tonumber(value_of(last, 'start')) + #cjson.decode(value_of(last, 'tokens'))
      term = math.max(term, tonumber(value_of(last, 'term')))
    end
  end
  term = term + 1
  local deliveries = tonumber(redis.call('HGET', request, 'deliveries') or 0)
  local given_up = 0
  if deliveries >= max_deliveries then given_up = 1 else deliveries = deliveries + 1 end
  redis.call('HSET', request, 'owner', edge, 'term', term, 'state', 'running', 'entry', entry,
    'next', next, 'deliveries', deliveries)
  local seed = value_of(fields, 'seed')
  if seed then redis.call('HSETNX', request, 'seed', seed) end
  redis.call('PERSIST', request)
  redis.call('PERSIST', result)
  return {entry, fields, id, taken, term, deliveries, given_up, streamed}
end

if ARGV[6] ~= '' then return claim(ARGV[6]) end

local cursor = '0-0'
repeat
  local reply = redis.call('XAUTOCLAIM', prompts, group, edge, lease_ms, cursor, 'COUNT', 1)
  cursor = reply[1]
  for _, idle in ipairs(reply[2]) do
    local claimed = claim(idle[1])
    if claimed then return claimed end
  end
until cursor == '0-0'
return false
