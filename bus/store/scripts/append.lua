-- Add a piece to a result and, in the same step, a window's entry to the telemetry. Guarantees:
-- only the owner of the current term writes; pieces follow each other without gap or overlap; a
-- repeat of the last piece (because the reply was lost) changes nothing.
--
-- KEYS  request, result, telemetry
-- ARGV  term, start, number of tokens, tokens, accepted, text, lengths, probe,
--       scores, scores of the prompt ('' where there are none), telemetry limit,
--       then the telemetry entry's fields and values, if any
-- reply {'ok'} | {'lost'} | {'gap', next}
local request, result = KEYS[1], KEYS[2]
local term, start, count = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local known = redis.call('HMGET', request, 'term', 'state', 'next')
if known[1] ~= term or known[2] ~= 'running' then return {'lost'} end
local next = tonumber(known[3])
local piece = {'kind', 'tokens', 'start', ARGV[2], 'tokens', ARGV[4], 'text', ARGV[6],
  'accepted', ARGV[5], 'lengths', ARGV[7], 'probe', ARGV[8], 'term', term}
if ARGV[9] ~= '' then piece[#piece + 1] = 'scores'; piece[#piece + 1] = ARGV[9] end
if ARGV[10] ~= '' then piece[#piece + 1] = 'prompt_scores'; piece[#piece + 1] = ARGV[10] end

if start + count == next then
  local last = redis.call('XREVRANGE', result, '+', '-', 'COUNT', 1)
  if #last > 0 then
    local same = #last[1][2] == #piece
    for i, value in ipairs(last[1][2]) do same = same and value == piece[i] end
    if same then return {'ok'} end
  end
end
if start ~= next then return {'gap', next} end

redis.call('XADD', result, '*', unpack(piece))
redis.call('HSET', request, 'next', start + count)
if #ARGV > 11 then
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[11], '*', unpack(ARGV, 12))
end
return {'ok'}
