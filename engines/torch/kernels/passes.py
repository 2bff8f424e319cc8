"""A pass over many rows, each thread on its share of every step."""

from __future__ import annotations

from typing import Any

from engines.torch.kernels.compiling import compiled
from engines.torch.kernels.instructions import (
    BLOCK,
    MOST_ROWS,
    add_one,
    dot_1,
    dot_2,
    dot_3,
    dot_4,
    floats_at,
    further,
    pointer_to,
    seen,
    yield_processor,
)
from engines.torch.kernels.row import attend, gate_row, normalise, round_row, turn_head

UNIT = 8
"""Input features are padded to a multiple of this."""
_LARGEST_WEIGHT = 127
_LARGEST_ACTIVATION = 4095
_SPINS = 2000  # looks at a counter before the processor is given to others


def largest_activation(width: int) -> int:
    """A: the largest whole number for activations with which no sum of `width` products of int8
    weights leaves int32."""
    return min(_LARGEST_ACTIVATION, (2**31 - 1) // (_LARGEST_WEIGHT * width))


@compiled
def _multiply(
    x: Any, steps: Any, num_rows: int, matrix: Any, layer: int, share: Any, out: Any, add: bool
) -> None:
    """out = x̂·Ŵᵀ scaled + bias, or out += …, for a share of the outputs.

    Args:
        x: int16*[num_rows, 2·pairs]. steps: float32*[num_rows].
        matrix: as `run` takes it. share: first block and the one after the last.
        out: float32*[num_rows, outputs].
    """
    weights, w_scales, biases, num_pairs, _ = matrix
    num_out = w_scales.shape[1]
    for block in range(share[0], share[1]):
        first = layer * num_out + block * BLOCK
        w, scale = pointer_to(weights, first * 2 * num_pairs), pointer_to(w_scales, first)
        bias = pointer_to(biases, first)
        for row in range(0, num_rows, MOST_ROWS):
            rows, step = further(x, row * 2 * num_pairs), further(steps, row)
            y = further(out, row * num_out + block * BLOCK)
            if row + 1 == num_rows:
                dot_1(rows, step, w, scale, bias, num_pairs, y, num_out, add)
            elif row + 2 == num_rows:
                dot_2(rows, step, w, scale, bias, num_pairs, y, num_out, add)
            elif row + 3 == num_rows:
                dot_3(rows, step, w, scale, bias, num_pairs, y, num_out, add)
            else:
                dot_4(rows, step, w, scale, bias, num_pairs, y, num_out, add)


@compiled
def _wait(arrivals: Any, num_threads: int) -> None:
    """Until all threads are here."""
    if num_threads == 1:
        return
    counter = pointer_to(arrivals, 0)
    all_here = (add_one(counter) // num_threads + 1) * num_threads
    tries = 0
    while seen(counter) < all_here:
        tries += 1
        if tries > _SPINS:
            yield_processor()


@compiled
def _share(thread: int, num_threads: int, num_blocks: int) -> Any:
    return thread * num_blocks // num_threads, (thread + 1) * num_blocks // num_threads


@compiled
def multiply(
    thread: int, num_threads: int, arrivals: Any, x: Any, matrix: Any, rounded: Any, steps: Any,
    out: Any,
) -> None:  # fmt: skip
    """x·Wᵀ + b: float32[n, in] → float32[n, outputs], for thread `thread` of `num_threads`.

    Args:
        matrix: as `run` takes it, of one layer. rounded: int16[n, 2·pairs], steps: float32[n]:
            to work in.
    """
    _, w_scales, _, num_pairs, largest = matrix
    num_rows, width = x.shape
    for row in range(thread, num_rows, num_threads):
        place = pointer_to(rounded, row * 2 * num_pairs)
        steps[row] = round_row(pointer_to(x, row * width), width, 2 * num_pairs, largest, place)
    _wait(arrivals, num_threads)
    share = _share(thread, num_threads, w_scales.shape[1] // BLOCK)
    _multiply(
        pointer_to(rounded, 0),
        pointer_to(steps, 0),
        num_rows,
        matrix,
        0,
        share,
        pointer_to(out, 0),
        False,
    )


@compiled
def _round_normalised(
    own: Any, x: Any, stride: int, width: int, epsilon: Any, matrix: Any, rounded: Any, steps: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """x̂ of the normalised rows, for the product with `matrix`."""
    num_in = 2 * matrix[3]
    for r in range(own[0], own[2], own[1]):
        normalise(further(x, r * stride), width, epsilon, scratch)
        steps[r] = round_row(scratch, width, num_in, matrix[4], further(rounded, r * num_in))


@compiled
def _store(
    own: Any, wide: Any, stride: int, shape: Any, rotation: Any, cache: Any, rows: Any, layer: int
) -> None:
    """Turn queries and keys of the rows, and write keys and values into the cache."""
    _, num_heads, num_kv, dim, _ = shape
    cos, signed_sin = rotation
    keys, values, capacities = cache
    session, slot, _, _ = rows
    for r in range(own[0], own[2], own[1]):
        row, s = further(wide, r * stride), session[r]
        turn_cos, turn_sin = pointer_to(cos, r * dim), pointer_to(signed_sin, r * dim)
        for h in range(num_heads):
            head = further(row, h * dim)
            turn_head(head, turn_cos, turn_sin, dim, head)
        for h in range(num_kv):
            place = (h * capacities[s] + slot[r]) * dim
            key = further(floats_at(keys[s, layer]), place)
            turn_head(further(row, (num_heads + h) * dim), turn_cos, turn_sin, dim, key)
            value = further(floats_at(values[s, layer]), place)
            given = further(row, (num_heads + num_kv + h) * dim)
            for i in range(dim):
                value[i] = given[i]


@compiled
def _places(r: int, rows: Any, tail: Any) -> Any:
    """How many positions row r sees, and how many of them lie in order; places of the rest."""
    _, slot, past, parent = rows
    depth, ancestor = 0, r
    while ancestor >= 0:
        depth += 1
        ancestor = parent[ancestor]
    ancestor, in_order = r, past[r] + depth
    for place in range(depth - 1, -1, -1):
        tail[place] = slot[ancestor]
        if slot[ancestor] != past[r] + place:
            in_order = past[r] + place
        ancestor = parent[ancestor]
    return past[r] + depth, in_order, further(tail, in_order - past[r])


@compiled
def _attend_rows(
    own: Any, wide: Any, stride: int, shape: Any, cache: Any, rows: Any, layer: int, tail: Any,
    scores: Any, mixed: Any,
) -> None:  # fmt: skip
    """Attention of the rows; a thread's share counts rows and key heads."""
    _, num_heads, num_kv, dim, _ = shape
    keys, values, capacities = cache
    session, group = rows[0], num_heads // num_kv
    for item in range(own[0], own[2] * num_kv, own[1]):
        r, h = item // num_kv, item % num_kv
        s = session[r]
        count, in_order, rest = _places(r, rows, tail)
        head_keys = further(floats_at(keys[s, layer]), h * capacities[s] * dim)
        head_values = further(floats_at(values[s, layer]), h * capacities[s] * dim)
        for g in range(h * group, (h + 1) * group):
            query = further(wide, r * stride + g * dim)
            out = further(mixed, (r * num_heads + g) * dim)
            attend(query, head_keys, head_values, dim, in_order, rest, count, scores, out)


@compiled
def _finish_layer(
    own: Any, arrivals: Any, states: Any, stride: int, epsilon: Any, layers: Any, layer: int,
    shape: Any, rounded: Any, steps: Any, wide: Any, mixed: Any, scratch: Any,
) -> None:  # fmt: skip
    """What follows a layer's attention, whose results are `mixed`."""
    hidden, num_heads, _, dim, gated = shape
    _, output, gate_up, down = layers
    gate_width = gate_up[1].shape[1]
    gate_share = _share(own[0], own[1], gate_width // BLOCK)
    share = _share(own[0], own[1], stride // BLOCK)
    for r in range(own[0], own[2], own[1]):
        place = further(rounded, r * 2 * output[3])
        row = further(mixed, r * num_heads * dim)
        steps[r] = round_row(row, num_heads * dim, 2 * output[3], output[4], place)
    _wait(arrivals, own[1])
    _multiply(rounded, steps, own[2], output, layer, share, states, True)
    _wait(arrivals, own[1])
    _round_normalised(own, states, stride, hidden, epsilon, gate_up, rounded, steps, scratch)
    _wait(arrivals, own[1])
    _multiply(rounded, steps, own[2], gate_up, layer, gate_share, wide, False)
    _wait(arrivals, own[1])
    for r in range(own[0], own[2], own[1]):
        row, place = further(wide, r * gate_width), further(rounded, r * 2 * down[3])
        gate_row(row, further(row, gated), gated)
        steps[r] = round_row(row, gated, 2 * down[3], down[4], place)
    _wait(arrivals, own[1])
    _multiply(rounded, steps, own[2], down, layer, share, states, True)
    _wait(arrivals, own[1])


@compiled
def _copy_rows(own: Any, x: Any, stride: int, width: int, out: Any) -> None:
    """The first `width` numbers of each row to float32*[n, width]."""
    for r in range(own[0], own[2], own[1]):
        row, place = further(x, r * stride), further(out, r * width)
        for i in range(width):
            place[i] = row[i]


@compiled
def run(
    thread: int, num_threads: int, arrivals: Any, x: Any, layers: Any, shape: Any, epsilon: Any,
    rotation: Any, cache: Any, rows: Any, work: Any, tap: Any,
) -> None:  # fmt: skip
    """All layers of a Llama or Qwen2 and the last norm, in place, for one thread.

    Args:
        thread, num_threads: which share this call works on. arrivals: int64[1], of a pass's
            threads together; 0 before.
        x: float32[n, padded hidden]; 0 beyond the hidden size, before and after.
        layers: the matrices qkv, output, gate_up, down, each
            (weights int8[layers, …] as `engines.torch.integer.IntegerMatrix` has them, scales
            float32[layers, outputs], biases float32[layers, outputs], pairs of padded inputs,
            A float32).
        shape: (hidden, heads, key heads, width of a head, gated width).
        rotation: cos and signed sin float32[n, d].
        cache: addresses of keys and of values int64[sessions, layers], each float32[key heads,
            capacity, d], and capacities int64[sessions].
        rows: int64[n] each: session; place in the cache; how many positions before lie in order;
            row of the parent, or −1 where that is the last of those.
        work: int16[n·most inputs], float32[n], float32[n·most outputs], float32[n·heads·d], and
            for each thread float32[≥ hidden], float32[longest prefix], int32[n].
        tap: for each layer the place where x after it is copied to, −1 for none, int64[layers], and
            float32[places, n, hidden].
    """
    num_rows, stride = x.shape
    hidden, qkv = shape[0], layers[0]
    own = (thread, num_threads, num_rows)
    rounded, steps, wide, mixed = (
        pointer_to(work[0], 0), pointer_to(work[1], 0),
        pointer_to(work[2], 0), pointer_to(work[3], 0),
    )  # fmt: skip
    scratch, scores, tail = (
        pointer_to(work[4], thread * work[4].shape[1]),
        pointer_to(work[5], thread * work[5].shape[1]),
        pointer_to(work[6], thread * work[6].shape[1]),
    )
    states, qkv_width = pointer_to(x, 0), qkv[1].shape[1]
    qkv_share = _share(thread, num_threads, qkv_width // BLOCK)
    for layer in range(qkv[1].shape[0]):
        _round_normalised(own, states, stride, hidden, epsilon, qkv, rounded, steps, scratch)
        _wait(arrivals, num_threads)
        _multiply(rounded, steps, num_rows, qkv, layer, qkv_share, wide, False)
        _wait(arrivals, num_threads)
        _store(own, wide, qkv_width, shape, rotation, cache, rows, layer)
        _wait(arrivals, num_threads)
        _attend_rows(own, wide, qkv_width, shape, cache, rows, layer, tail, scores, mixed)
        _wait(arrivals, num_threads)
        _finish_layer(
            own, arrivals, states, stride, epsilon, layers, layer, shape, rounded, steps, wide,
            mixed, scratch,
        )  # fmt: skip
        if tap[0][layer] >= 0:
            place = pointer_to(tap[1], tap[0][layer] * num_rows * hidden)
            _copy_rows(own, states, stride, hidden, place)
    for r in range(thread, num_rows, num_threads):
        row = further(states, r * stride)
        normalise(row, hidden, epsilon, row)


@compiled
def run_layer(
    thread: int, num_threads: int, arrivals: Any, e: Any, x: Any, first: int, layers: Any,
    shape: Any, epsilon: Any, rotation: Any, cache: Any, rows: Any, work: Any,
) -> None:  # fmt: skip
    """One layer whose queries, keys and values are of [n(e); n(x)], in place on x, for one thread.

    Args:
        e: float32[n, hidden]. x: as `run` takes it.
        first: rows before these, which have run already; `rotation` and `rows` have them too.
        layers: as `run` takes them, of one layer; qkv is 2·hidden wide.
        work: as `run` takes it, for all rows, and a row is float32[≥ 2·hidden].
        Others as `run` takes them.
    """
    num_rows, stride = x.shape
    hidden, num_heads, num_kv, dim, _ = shape
    qkv = layers[0]
    own, total = (thread, num_threads, num_rows), first + num_rows
    rounded, steps, wide, mixed = (
        pointer_to(work[0], 0), pointer_to(work[1], 0),
        pointer_to(work[2], 0), pointer_to(work[3], 0),
    )  # fmt: skip
    scratch, scores, tail = (
        pointer_to(work[4], thread * work[4].shape[1]),
        pointer_to(work[5], thread * work[5].shape[1]),
        pointer_to(work[6], thread * work[6].shape[1]),
    )
    states, qkv_width = pointer_to(x, 0), qkv[1].shape[1]
    for r in range(thread, num_rows, num_threads):
        normalise(pointer_to(e, r * hidden), hidden, epsilon, scratch)
        normalise(further(states, r * stride), hidden, epsilon, further(scratch, hidden))
        place = further(rounded, r * 2 * qkv[3])
        steps[r] = round_row(scratch, 2 * hidden, 2 * qkv[3], qkv[4], place)
    _wait(arrivals, num_threads)
    share = _share(thread, num_threads, qkv_width // BLOCK)
    _multiply(rounded, steps, num_rows, qkv, 0, share, further(wide, first * qkv_width), False)
    _wait(arrivals, num_threads)
    later = (first + thread, num_threads, total)
    _store(later, wide, qkv_width, shape, rotation, cache, rows, 0)
    _wait(arrivals, num_threads)
    heads = (first * num_kv + thread, num_threads, total)
    _attend_rows(heads, wide, qkv_width, shape, cache, rows, 0, tail, scores, mixed)
    _wait(arrivals, num_threads)
    new = further(mixed, first * num_heads * dim)
    _finish_layer(
        own, arrivals, states, stride, epsilon, layers, 0, shape, rounded, steps, wide, new, scratch
    )
