"""Operations whose result for a row is bitwise the same whatever rows are run beside it.

torch promises no such thing. Its kernels cut their work by the number of elements and threads, and
the few elements at the end of a cut go through other instructions than the rest, with other last
bits. Three facts keep the operations here apart from that:

* IEEE arithmetic (+, −, ×, ÷, √, max) is rounded correctly, however it is vectorised. A product
  and a sum must be two operations: within one, a compiler may fuse them.
* A kernel for transcendental functions runs on one thread below `_SERIAL` elements, row by row
  where rows do not adjoin in memory or have a multiple of `LANES` elements.
* The attention of a single query has the same shapes at the same position, always. On several
  threads its buffers lie elsewhere and MKL cuts its products, so it runs on one. MKL also looks
  at where a query begins in memory, so that one that would not begin at a vector is copied.

Every row is float32 and at most `_SERIAL` wide where a docstring does not say otherwise.
`tests/models/test_rowwise.py` holds this for 1 to 4 threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16
"""Widths are padded to multiples of this: two vectors of AVX2, one of AVX-512."""
_SERIAL = 32_767  # torch starts further threads at 32,768 elements


def each(operation: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """An elementwise operation on float32[n, width]; `width` is a multiple of `LANES`, or n is 1.

    Rows too wide for one call are cut at multiples of `LANES`.
    """
    width = rows.shape[1]
    if rows.numel() <= _SERIAL:
        return operation(rows)
    if width > _SERIAL:
        step = _SERIAL // LANES * LANES
        return torch.cat(
            [
                torch.cat([operation(row[:, at : at + step]) for at in range(0, width, step)], 1)
                for row in torch.split(rows, 1)
            ]
        )
    return torch.cat([operation(part) for part in torch.split(rows, max(1, _SERIAL // width))])


def normalised(rows: Tensor, epsilon: float) -> Tensor:
    """x / √(mean x² + ε) of float32[n, hidden], without gain."""
    mean = (rows * rows).sum(dim=-1, keepdim=True) / rows.shape[-1]
    return rows / (mean + epsilon).sqrt()


def gated(gate_up: Tensor) -> Tensor:
    """silu(g) ∘ u of float32[n, 2·width] with g and u side by side."""
    gate, up = gate_up.chunk(2, dim=1)
    return each(F.silu, gate) * up


def rotated(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """RoPE of float32[n, heads, d]; `cos` and `signed_sin` are float32[n, 1, d]."""
    return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * signed_sin


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention, one query at a time.

    Args:
        queries: float32[n, kv_heads, g, d]; the g queries that share a key head lie together. They
            belong to the last n of L positions.
        keys, values: float32[1, kv_heads, L, d].

    Returns:
        float32[n, kv_heads·g·d].
    """
    num_queries = queries.shape[0]
    first = keys.shape[2] - num_queries + 1  # positions the first query sees
    each_query = torch.split(queries, 1)
    if queries.stride(0) % LANES:
        each_query = tuple(query.clone() for query in each_query)
    with _one_thread():
        mixed = [
            F.scaled_dot_product_attention(
                query, keys[:, :, : first + i], values[:, :, : first + i]
            ).reshape(1, -1)
            for i, query in enumerate(each_query)
        ]
    return mixed[0] if num_queries == 1 else torch.cat(mixed)


def exp_sum(rows: Tensor) -> Tensor:
    """float64[n]: Σ exp(x) over each row of float32[n, width], exponentials in float32.

    Any width: each row is cut in the same places.
    """
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    step = _SERIAL // LANES * LANES
    for begin in range(0, rows.shape[1], step):
        part = rows[:, begin : begin + step]
        sums = [row.exp().sum(dtype=torch.float64) for row in part.unbind()]
        total += torch.stack(sums)
    return total


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread; costs 5 µs where it had more, for which a process runs one model
    thread."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
