"""Instructions that numba does not offer, written for LLVM; `compiled` makes functions of them.

Pointers are counted in elements. Sums and products of vectors have eight lanes; LLVM puts them into
what registers the processor has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 16
"""Outputs whose weights lie together: two vectors of eight sums."""
MOST_ROWS = 4
"""Most rows that go through a block at once: eight vectors of sums in registers."""
_AHEAD = 2048  # bytes between the weights used and those fetched

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_SUMS, _LANES = ir.VectorType(_I32, 8), ir.VectorType(ir.FloatType(), 8)


def _instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    wrapped: Callable[..., Any] = intrinsic(function)
    return wrapped


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


dot_1, dot_2, dot_3, dot_4 = (_dot_block(count) for count in range(1, MOST_ROWS + 1))


@_instruction
def dot(_context: Any, a: Any, b: Any, num_vectors: Any) -> tuple[Any, Any]:
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


mix_1, mix_4 = _mix_vectors(1), _mix_vectors(4)


@_instruction
def float_of_bits(_context: Any, bits: Any) -> tuple[Any, Any]:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@_instruction
def bits_of_float(_context: Any, number: Any) -> tuple[Any, Any]:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), generate


@_instruction
def pointer_to(_context: Any, array: Any, offset: Any) -> tuple[Any, Any]:
    """Pointer to an element of a contiguous array, counted through all dimensions."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.gep(held.data, [arguments[1]])

    return types.CPointer(array.dtype)(array, types.int64), generate


@_instruction
def floats_at(_context: Any, address: Any) -> tuple[Any, Any]:
    """A float32* of an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@_instruction
def further(_context: Any, pointer: Any, offset: Any) -> tuple[Any, Any]:
    """A pointer `offset` elements further."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), generate


@_instruction
def add_one(_context: Any, counter: Any) -> tuple[Any, Any]:
    """Count up an int64* for all threads to see; the number before."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], ir.Constant(_I64, 1), "seq_cst")

    return types.int64(counter), generate


@_instruction
def seen(_context: Any, counter: Any) -> tuple[Any, Any]:
    """An int64* as other threads have left it."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(arguments[0], "seq_cst", 8)

    return types.int64(counter), generate


yield_processor = types.ExternalFunction("sched_yield", types.int32())
