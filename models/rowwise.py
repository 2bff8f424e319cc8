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

The functions are TorchScript: a decoder calls some forty small operations a layer, and Python takes
longer to start each than a small model's layer may take.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16
"""Widths are padded to multiples of this: two vectors of AVX2, one of AVX-512."""
_SERIAL = 32_767  # torch starts further threads at 32,768 elements
_STEP = _SERIAL // LANES * LANES

_Function = TypeVar("_Function", bound=Callable[..., object])


def scripted(function: _Function) -> _Function:
    """The function as TorchScript. Without the executor that profiles shapes first, which would
    compile anew in the first passes of a session and saves nothing on a CPU."""
    with warnings.catch_warnings():  # torch announces a successor, which needs a C++ compiler
        warnings.simplefilter("ignore")
        torch._C._jit_set_profiling_executor(False)
        compiled: _Function = torch.jit.script(function)
    return compiled


@scripted
def silu(rows: Tensor) -> Tensor:
    """silu of float32[n, width]; `width` is a multiple of `LANES`, or n is 1.

    Rows too wide for one call are cut at multiples of `LANES`.
    """
    width = rows.shape[1]
    if rows.numel() <= 32767:
        return F.silu(rows)
    if width <= 32767:
        return torch.cat([F.silu(part) for part in torch.split(rows, 32767 // width)])
    cut: list[Tensor] = []
    for row in torch.split(rows, 1):
        cut += [F.silu(part) for part in torch.split(row, 32752, 1)]
    return torch.cat(cut, 1).view(rows.shape[0], width)


@scripted
def gated(gate_up: Tensor) -> Tensor:
    """silu(g) ∘ u of float32[n, 2·width] with g and u side by side."""
    gate, up = gate_up.chunk(2, 1)
    return silu(gate) * up


@scripted
def normalised(rows: Tensor, epsilon: float) -> Tensor:
    """x / √(mean x² + ε) of float32[n, hidden], without gain."""
    mean = (rows * rows).sum(-1, keepdim=True) / rows.shape[-1]
    return rows / (mean + epsilon).sqrt()


@scripted
def rotated(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """RoPE of float32[n, heads, d]; `cos` and `signed_sin` are float32[n, 1, d]."""
    return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * signed_sin


@scripted
def attention(queries: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
    """Causal attention, one query at a time. Call it within `one_thread`.

    Args:
        queries: float32[n, kv_heads, g, d]; the g queries that share a key head lie together. They
            belong to positions past … past+n−1.
        keys, values: float32[1, kv_heads, capacity, d], of which positions up to the query's count.

    Returns:
        float32[n, kv_heads·g·d].
    """
    aligned = queries.stride(0) % 16 == 0
    mixed: list[Tensor] = []
    for index in range(queries.shape[0]):
        seen = past + index + 1
        query = queries[index : index + 1]
        mixed.append(
            F.scaled_dot_product_attention(
                query if aligned else query.clone(), keys[:, :, :seen], values[:, :, :seen]
            ).reshape(1, -1)
        )
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def exp_sum(rows: Tensor) -> Tensor:
    """float64[n]: Σ exp(x) over each row of float32[n, width], exponentials in float32.

    Any width: each row is cut in the same places.
    """
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    for begin in range(0, rows.shape[1], _STEP):
        part = rows[:, begin : begin + _STEP]
        sums = [row.exp().sum(dtype=torch.float64) for row in part.unbind()]
        total += torch.stack(sums)
    return total


@contextmanager
def one_thread() -> Iterator[None]:
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
