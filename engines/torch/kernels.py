"""The arithmetic of an int8 pass, compiled by numba: products in integers, and all around them.

A row's result has the same bits whatever rows are beside it, however many threads work and on
whatever processor, because every operation is exact or rounded as IEEE 754 says, and each row's
operations come in one order:

* A product's sums are whole numbers below 2³¹, exact in any order.
* +, −, ×, ÷, √ and comparison are rounded correctly, vectorised or not. numba fuses no product with
  a sum unless it is asked to. The exponential is a polynomial of these operations.
* A sum of floating-point numbers runs over eight fixed lanes, then over the lanes.

A pass is `run`: each thread runs the whole function on its share of every step and waits for the
others between steps. Rows of several sessions, and of chains and trees of tokens, run together; a
row attends to its session's prefix and its ancestors among the rows, in order of position.

numba caches the machine code on disk and invalidates it when this file changes, but not when an
imported one does: everything that is compiled together is in this one file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 16
"""Outputs whose weights lie together: two vectors of eight sums."""
UNIT = 8
"""Input features are padded to a multiple of this."""
_ROWS = 4  # most rows that go through a block at once: eight vectors of sums in registers
_AHEAD = 2048  # bytes between the weights used and those fetched
_LARGEST_WEIGHT = 127
_LARGEST_ACTIVATION = 4095

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_SUMS, _LANES = ir.VectorType(_I32, 8), ir.VectorType(ir.FloatType(), 8)
_MAGIC = np.float32(12_582_912.0)  # 1.5 · 2²³: adding it rounds to the nearest whole number
_MAGIC_BITS = np.int32(0x4B400000)
_DAMAGED = np.int32(0x7F800000)  # bits of infinity: NaN's are above
_TINY = np.float32(1e-30)
_SPINS = 2000  # looks at a counter before the processor is given to others

_Function = TypeVar("_Function", bound=Callable[..., object])


def largest_activation(width: int) -> int:
    """A: the largest whole number for activations with which no sum of `width` products of int8
    weights leaves int32."""
    return min(_LARGEST_ACTIVATION, (2**31 - 1) // (_LARGEST_WEIGHT * width))


def _instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    wrapped: Callable[..., Any] = intrinsic(function)
    return wrapped


def _compiled(function: _Function) -> _Function:
    compiled: Any = njit(nogil=True, cache=True, error_model="numpy")(function)
    return cast("_Function", compiled)


# --- instructions that numba does not offer ------------------------------------------------


def _offset(builder: Any, pointer: Any, count: int) -> Any:
    return builder.gep(pointer, [ir.Constant(_I64, count)])


def _vector(builder: Any, pointer: Any, kind: Any) -> Any:
    """Load a vector from where its first element is."""
    loaded = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    loaded.align = 1
    return loaded


def _spread(builder: Any, number: Any, kind: Any) -> Any:
    """A vector of one number."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_SUMS, [0] * 8))


def _pairwise(builder: Any, a: Any, b: Any) -> Any:
    """int32[8] a₂ᵢ·b₂ᵢ + a₂ᵢ₊₁·b₂ᵢ₊₁ of int16[16]: one instruction where the processor has it."""
    wide = ir.VectorType(_I32, 16)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    undefined = ir.Constant(wide, ir.Undefined)
    even, odd = (ir.Constant(_SUMS, list(range(first, 16, 2))) for first in (0, 1))
    return builder.add(
        builder.shuffle_vector(product, undefined, even),
        builder.shuffle_vector(product, undefined, odd),
    )


def _dot_block(num_rows: int) -> Any:
    """A function for so many rows with one block of weights."""
    unrolled = 4 if num_rows == 1 else 2  # pairs a turn of the loop [measured]

    @_instruction
    def dot(
        _context: Any, rows: Any, steps: Any, weights: Any, scales: Any, bias: Any, num_pairs: Any,
        out: Any, stride: Any, add: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        """y_mo (+)= step_m · scale_o · Σ_k x̂_mk · Ŵ_ok + bias_o.

        rows int16* [rows, 2·num_pairs], num_pairs a multiple of 4; weights int8* [num_pairs,
        BLOCK, 2]; scales, bias float32* [BLOCK]; out float32*, rows `stride` apart.
        """

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            rows, steps, weights, scales, bias, num_pairs, out, stride, add = arguments
            kind = ir.VectorType(_I16, 16)
            fetch = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]),
                "llvm.prefetch.p0",
            )
            pairs = [
                builder.bitcast(
                    builder.gep(rows, [builder.mul(num_pairs, ir.Constant(_I64, 2 * m))]),
                    _I32.as_pointer(),
                )
                for m in range(num_rows)
            ]
            before, loop = builder.basic_block, builder.append_basic_block("pairs")
            builder.branch(loop)
            builder.position_at_end(loop)
            index = builder.phi(_I64)
            index.add_incoming(ir.Constant(_I64, 0), before)
            totals = [builder.phi(_SUMS) for _ in range(2 * num_rows)]
            for total in totals:
                total.add_incoming(ir.Constant(_SUMS, [0] * 8), before)
            here = builder.gep(weights, [builder.mul(index, ir.Constant(_I64, 2 * BLOCK))])
            current = list(totals)
            for step in range(unrolled):
                if step % 2 == 0:  # a line of memory holds two steps
                    line = _offset(builder, here, _AHEAD + 2 * BLOCK * step)
                    builder.call(fetch, [line, *(ir.Constant(_I32, n) for n in (0, 3, 1))])
                halves = [
                    builder.sext(
                        _vector(
                            builder, _offset(builder, here, 2 * BLOCK * step + BLOCK * half),
                            ir.VectorType(_I8, 16),
                        ), kind,
                    )
                    for half in range(2)
                ]  # fmt: skip
                for m in range(num_rows):
                    place = builder.gep(pairs[m], [builder.add(index, ir.Constant(_I64, step))])
                    pair = builder.load(place)
                    pair.align = 2
                    both = builder.bitcast(_spread(builder, pair, _SUMS), kind)
                    for half in range(2):
                        product = _pairwise(builder, halves[half], both)
                        current[2 * m + half] = builder.add(current[2 * m + half], product)
            following = builder.add(index, ir.Constant(_I64, unrolled))
            index.add_incoming(following, loop)
            for total, last in zip(totals, current, strict=True):
                total.add_incoming(last, loop)
            after = builder.append_basic_block("done")
            builder.cbranch(builder.icmp_signed("<", following, num_pairs), loop, after)
            builder.position_at_end(after)
            for m in range(num_rows):
                step = _spread(builder, builder.load(_offset(builder, steps, m)), _LANES)
                row = builder.gep(out, [builder.mul(stride, ir.Constant(_I64, m))])
                for half in range(2):
                    target = _offset(builder, row, 8 * half)
                    y = builder.fmul(builder.sitofp(current[2 * m + half], _LANES), step)
                    y = builder.fmul(
                        y, _vector(builder, _offset(builder, scales, 8 * half), _LANES)
                    )
                    y = builder.fadd(y, _vector(builder, _offset(builder, bias, 8 * half), _LANES))
                    more = builder.fadd(_vector(builder, target, _LANES), y)
                    place = builder.bitcast(target, _LANES.as_pointer())
                    builder.store(builder.select(add, more, y), place).align = 4
            return context.get_dummy_value()

        signature = types.void(
            rows, steps, weights, scales, bias, types.int64, out, types.int64, types.boolean
        )
        return signature, generate

    return dot


_dot_1, _dot_2, _dot_3, _dot_4 = (_dot_block(count) for count in range(1, _ROWS + 1))


@_instruction
def _dot(_context: Any, a: Any, b: Any, num_vectors: Any) -> tuple[Any, Any]:
    """Σ a_i·b_i of float32*, 8·num_vectors numbers: eight lanes, then halves of them added."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        a, b, num_vectors = arguments
        zero = ir.Constant(_LANES, [0.0] * 8)
        before = builder.basic_block
        loop, after = (builder.append_basic_block(name) for name in ("lanes", "summed"))
        builder.cbranch(builder.icmp_signed("<", ir.Constant(_I64, 0), num_vectors), loop, after)
        builder.position_at_end(loop)
        index, total = builder.phi(_I64), builder.phi(_LANES)
        index.add_incoming(ir.Constant(_I64, 0), before)
        total.add_incoming(zero, before)
        place = builder.mul(index, ir.Constant(_I64, 8))
        product = builder.fmul(
            _vector(builder, builder.gep(a, [place]), _LANES),
            _vector(builder, builder.gep(b, [place]), _LANES),
        )
        more = builder.fadd(total, product)
        following = builder.add(index, ir.Constant(_I64, 1))
        index.add_incoming(following, loop)
        total.add_incoming(more, loop)
        builder.cbranch(builder.icmp_signed("<", following, num_vectors), loop, after)
        builder.position_at_end(after)
        lanes = builder.phi(_LANES)
        lanes.add_incoming(zero, before)
        lanes.add_incoming(more, loop)
        size = 8
        while size > 1:
            size //= 2
            kind = ir.VectorType(_I32, size)
            low, high = (
                builder.shuffle_vector(
                    lanes, ir.Constant(lanes.type, ir.Undefined),
                    ir.Constant(kind, list(range(first, first + size))),
                )
                for first in (0, size)
            )  # fmt: skip
            lanes = builder.fadd(low, high)
        return builder.extract_element(lanes, ir.Constant(_I32, 0))

    return types.float32(a, b, types.int64), generate


def _mix_vectors(num_vectors: int) -> Any:
    """A function for so many vectors of eight features."""

    @_instruction
    def mix(
        _context: Any, shares: Any, values: Any, stride: Any, count: Any, out: Any
    ) -> tuple[Any, Any]:
        """out_i += Σ_t p_t·v_ti, t rising: p float32*[count], v float32*, rows `stride` apart."""

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            shares, values, stride, count, out = arguments
            places = [_offset(builder, out, 8 * v) for v in range(num_vectors)]
            held = [_vector(builder, place, _LANES) for place in places]
            before = builder.basic_block
            loop, after = (builder.append_basic_block(name) for name in ("positions", "mixed"))
            none = builder.icmp_signed("<=", count, ir.Constant(_I64, 0))
            builder.cbranch(none, after, loop)
            builder.position_at_end(loop)
            index = builder.phi(_I64)
            totals = [builder.phi(_LANES) for _ in places]
            share = _spread(builder, builder.load(builder.gep(shares, [index])), _LANES)
            row = builder.gep(values, [builder.mul(index, stride)])
            sums = [
                builder.fadd(
                    totals[v],
                    builder.fmul(share, _vector(builder, _offset(builder, row, 8 * v), _LANES)),
                )
                for v in range(num_vectors)
            ]
            following = builder.add(index, ir.Constant(_I64, 1))
            index.add_incoming(ir.Constant(_I64, 0), before)
            index.add_incoming(following, loop)
            for total, first, last in zip(totals, held, sums, strict=True):
                total.add_incoming(first, before)
                total.add_incoming(last, loop)
            builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
            builder.position_at_end(after)
            results = [builder.phi(_LANES) for _ in places]
            for place, result, first, last in zip(places, results, held, sums, strict=True):
                result.add_incoming(first, before)
                result.add_incoming(last, loop)
                target = builder.bitcast(place, _LANES.as_pointer())
                builder.store(result, target).align = 4
            return context.get_dummy_value()

        signature = types.void(shares, values, types.int64, types.int64, out)
        return signature, generate

    return mix


_mix_1, _mix_4 = _mix_vectors(1), _mix_vectors(4)


@_instruction
def _float_of_bits(_context: Any, bits: Any) -> tuple[Any, Any]:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@_instruction
def _bits_of_float(_context: Any, number: Any) -> tuple[Any, Any]:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), generate


@_instruction
def _place(_context: Any, array: Any, offset: Any) -> tuple[Any, Any]:
    """Pointer to an element of a contiguous array, counted through all dimensions."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.gep(held.data, [arguments[1]])

    return types.CPointer(array.dtype)(array, types.int64), generate


@_instruction
def _floats_at(_context: Any, address: Any) -> tuple[Any, Any]:
    """A float32* of an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@_instruction
def _further(_context: Any, pointer: Any, offset: Any) -> tuple[Any, Any]:
    """A pointer `offset` elements further."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), generate


@_instruction
def _add_one(_context: Any, counter: Any) -> tuple[Any, Any]:
    """Count up an int64* for all threads to see; the number before."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], ir.Constant(_I64, 1), "seq_cst")

    return types.int64(counter), generate


@_instruction
def _seen(_context: Any, counter: Any) -> tuple[Any, Any]:
    """An int64* as other threads have left it."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(arguments[0], "seq_cst", 8)

    return types.int64(counter), generate


_yield_processor = types.ExternalFunction("sched_yield", types.int32())


# --- one row ----------------------------------------------------------------------------------
# Rows are float32*; pointers, because an index into an array may count from its end, which keeps
# loops from being vectorised.


@_compiled
def _exp(x: Any) -> Any:
    """eˣ of float32 in [−87, 88]: 2ⁿ·e^r with |r| ≤ ½ ln 2 (the polynomial of Cephes' expf)."""
    shifted = x * np.float32(1.4426950408889634) + _MAGIC
    n = shifted - _MAGIC
    r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = (p * r) * r + r + np.float32(1.0)
    power = np.int32(np.int32(_bits_of_float(shifted) - _MAGIC_BITS + np.int32(127)) << 23)
    return p * _float_of_bits(power)


@_compiled
def _rounded(row: Any, width: int, padded: int, largest: Any, out: Any) -> Any:
    """Round `width` numbers into int16*[padded]; the size of a step, NaN for a damaged row."""
    peak_bits = np.int32(0)
    for i in range(width):
        peak_bits = max(peak_bits, np.int32(_bits_of_float(row[i]) & np.int32(0x7FFFFFFF)))
    peak = _float_of_bits(peak_bits)
    done = 0
    if peak_bits < _DAMAGED and peak > _TINY:
        factor = largest / peak
        for i in range(width):
            shifted = row[i] * factor + _MAGIC
            out[i] = np.int16(_bits_of_float(shifted) - _MAGIC_BITS)
        done = width
    for i in range(done, padded):
        out[i] = np.int16(0)
    return peak / largest if peak_bits < _DAMAGED else np.float32(np.nan)


@_compiled
def _normalised(row: Any, width: int, epsilon: Any, out: Any) -> None:
    """x / √(mean x² + ε)."""
    whole = width // 8
    total = _dot(row, row, whole)
    for i in range(8 * whole, width):
        total += row[i] * row[i]
    root = np.sqrt(total / np.float32(width) + epsilon)
    for i in range(width):
        out[i] = row[i] / root


@_compiled
def _gated(gate: Any, up: Any, width: int) -> None:
    """silu(g)·u, over g."""
    for i in range(width):
        power = -gate[i]
        power = power if not power > np.float32(88) else np.float32(88)
        power = power if not power < np.float32(-87) else np.float32(-87)
        gate[i] = gate[i] / (np.float32(1) + _exp(power)) * up[i]


@_compiled
def _turned(head: Any, cos: Any, signed_sin: Any, dim: int, out: Any) -> None:
    """RoPE of one head."""
    half = dim // 2
    for i in range(half):
        low, high = head[i], head[half + i]
        out[i] = low * cos[i] + high * signed_sin[i]
        out[half + i] = high * cos[half + i] + low * signed_sin[half + i]


@_compiled
def _mix(shares: Any, values: Any, dim: int, count: int, out: Any) -> None:
    """out += Σ_t p_t·v_t over `count` rows of values."""
    i = 0
    while i + 32 <= dim:
        _mix_4(shares, _further(values, i), dim, count, _further(out, i))
        i += 32
    while i + 8 <= dim:
        _mix_1(shares, _further(values, i), dim, count, _further(out, i))
        i += 8
    for t in range(count):
        for j in range(i, dim):
            out[j] += shares[t] * values[t * dim + j]


@_compiled
def _attend(
    query: Any, keys: Any, values: Any, dim: int, past: int, tail: Any, count: int, scores: Any,
    out: Any,
) -> None:  # fmt: skip
    """softmax(q·Kᵀ/√d)·V of one head.

    Args:
        keys, values: [capacity, dim]. past: how many positions lie in order there.
        tail: int32*[count − past], where the rest lie.
        scores: [count], to work in.
    """
    scale = np.float32(1) / np.sqrt(np.float32(dim))
    whole = dim // 8
    top = np.float32(-np.inf)
    for t in range(count):
        key = _further(keys, (t if t < past else tail[t - past]) * dim)
        score = _dot(query, key, whole)
        for i in range(8 * whole, dim):
            score += query[i] * key[i]
        score *= scale
        scores[t] = score
        top = score if score > top else top
    for t in range(count):
        power = scores[t] - top
        scores[t] = _exp(power if not power < np.float32(-87) else np.float32(-87))
    total = np.float64(0)
    for t in range(count):
        total += scores[t]
    for i in range(dim):
        out[i] = np.float32(0)
    _mix(scores, values, dim, past, out)
    for t in range(past, count):
        _mix(_further(scores, t), _further(values, tail[t - past] * dim), dim, 1, out)
    inverse = np.float32(1 / total)
    for i in range(dim):
        out[i] *= inverse


# --- many rows --------------------------------------------------------------------------------


@_compiled
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
        w, scale = _place(weights, first * 2 * num_pairs), _place(w_scales, first)
        bias = _place(biases, first)
        for row in range(0, num_rows, _ROWS):
            rows, step = _further(x, row * 2 * num_pairs), _further(steps, row)
            y = _further(out, row * num_out + block * BLOCK)
            if row + 1 == num_rows:
                _dot_1(rows, step, w, scale, bias, num_pairs, y, num_out, add)
            elif row + 2 == num_rows:
                _dot_2(rows, step, w, scale, bias, num_pairs, y, num_out, add)
            elif row + 3 == num_rows:
                _dot_3(rows, step, w, scale, bias, num_pairs, y, num_out, add)
            else:
                _dot_4(rows, step, w, scale, bias, num_pairs, y, num_out, add)


@_compiled
def _wait(arrivals: Any, num_threads: int) -> None:
    """Until all threads are here."""
    if num_threads == 1:
        return
    counter = _place(arrivals, 0)
    all_here = (_add_one(counter) // num_threads + 1) * num_threads
    tries = 0
    while _seen(counter) < all_here:
        tries += 1
        if tries > _SPINS:
            _yield_processor()


@_compiled
def _share(thread: int, num_threads: int, num_blocks: int) -> Any:
    return thread * num_blocks // num_threads, (thread + 1) * num_blocks // num_threads


@_compiled
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
        place = _place(rounded, row * 2 * num_pairs)
        steps[row] = _rounded(_place(x, row * width), width, 2 * num_pairs, largest, place)
    _wait(arrivals, num_threads)
    share = _share(thread, num_threads, w_scales.shape[1] // BLOCK)
    _multiply(
        _place(rounded, 0), _place(steps, 0), num_rows, matrix, 0, share, _place(out, 0), False
    )


@_compiled
def _round_normalised(
    own: Any, x: Any, stride: int, width: int, epsilon: Any, matrix: Any, rounded: Any, steps: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """x̂ of the normalised rows, for the product with `matrix`."""
    num_in = 2 * matrix[3]
    for r in range(own[0], own[2], own[1]):
        _normalised(_further(x, r * stride), width, epsilon, scratch)
        steps[r] = _rounded(scratch, width, num_in, matrix[4], _further(rounded, r * num_in))


@_compiled
def _store(
    own: Any, wide: Any, stride: int, shape: Any, rotation: Any, cache: Any, rows: Any, layer: int
) -> None:
    """Turn queries and keys of the rows, and write keys and values into the cache."""
    _, num_heads, num_kv, dim, _ = shape
    cos, signed_sin = rotation
    keys, values, capacities = cache
    session, slot, _, _ = rows
    for r in range(own[0], own[2], own[1]):
        row, s = _further(wide, r * stride), session[r]
        turn, turn_sin = _place(cos, r * dim), _place(signed_sin, r * dim)
        for h in range(num_heads):
            head = _further(row, h * dim)
            _turned(head, turn, turn_sin, dim, head)
        for h in range(num_kv):
            place = (h * capacities[s] + slot[r]) * dim
            key = _further(_floats_at(keys[s, layer]), place)
            _turned(_further(row, (num_heads + h) * dim), turn, turn_sin, dim, key)
            value = _further(_floats_at(values[s, layer]), place)
            given = _further(row, (num_heads + num_kv + h) * dim)
            for i in range(dim):
                value[i] = given[i]


@_compiled
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
    return past[r] + depth, in_order, _further(tail, in_order - past[r])


@_compiled
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
        head_keys = _further(_floats_at(keys[s, layer]), h * capacities[s] * dim)
        head_values = _further(_floats_at(values[s, layer]), h * capacities[s] * dim)
        for g in range(h * group, (h + 1) * group):
            query = _further(wide, r * stride + g * dim)
            out = _further(mixed, (r * num_heads + g) * dim)
            _attend(query, head_keys, head_values, dim, in_order, rest, count, scores, out)


@_compiled
def run(
    thread: int, num_threads: int, arrivals: Any, x: Any, layers: Any, shape: Any, epsilon: Any,
    rotation: Any, cache: Any, rows: Any, work: Any,
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
    """
    num_rows, stride = x.shape
    hidden, num_heads, _, dim, gated = shape
    qkv, output, gate_up, down = layers
    own = (thread, num_threads, num_rows)
    rounded, steps, wide, mixed = (
        _place(work[0], 0), _place(work[1], 0), _place(work[2], 0), _place(work[3], 0)
    )  # fmt: skip
    scratch, scores, tail = (
        _place(work[4], thread * work[4].shape[1]),
        _place(work[5], thread * work[5].shape[1]),
        _place(work[6], thread * work[6].shape[1]),
    )
    states, qkv_width, gate_width = _place(x, 0), qkv[1].shape[1], gate_up[1].shape[1]
    qkv_share = _share(thread, num_threads, qkv_width // BLOCK)
    gate_share = _share(thread, num_threads, gate_width // BLOCK)
    share = _share(thread, num_threads, stride // BLOCK)
    for layer in range(qkv[1].shape[0]):
        _round_normalised(own, states, stride, hidden, epsilon, qkv, rounded, steps, scratch)
        _wait(arrivals, num_threads)
        _multiply(rounded, steps, num_rows, qkv, layer, qkv_share, wide, False)
        _wait(arrivals, num_threads)
        _store(own, wide, qkv_width, shape, rotation, cache, rows, layer)
        _wait(arrivals, num_threads)
        _attend_rows(own, wide, qkv_width, shape, cache, rows, layer, tail, scores, mixed)
        _wait(arrivals, num_threads)
        for r in range(thread, num_rows, num_threads):
            place = _further(rounded, r * 2 * output[3])
            row = _further(mixed, r * num_heads * dim)
            steps[r] = _rounded(row, num_heads * dim, 2 * output[3], output[4], place)
        _wait(arrivals, num_threads)
        _multiply(rounded, steps, num_rows, output, layer, share, states, True)
        _wait(arrivals, num_threads)
        _round_normalised(own, states, stride, hidden, epsilon, gate_up, rounded, steps, scratch)
        _wait(arrivals, num_threads)
        _multiply(rounded, steps, num_rows, gate_up, layer, gate_share, wide, False)
        _wait(arrivals, num_threads)
        for r in range(thread, num_rows, num_threads):
            row, place = _further(wide, r * gate_width), _further(rounded, r * 2 * down[3])
            _gated(row, _further(row, gated), gated)
            steps[r] = _rounded(row, gated, 2 * down[3], down[4], place)
        _wait(arrivals, num_threads)
        _multiply(rounded, steps, num_rows, down, layer, share, states, True)
        _wait(arrivals, num_threads)
    for r in range(thread, num_rows, num_threads):
        row = _further(states, r * stride)
        _normalised(row, hidden, epsilon, row)
