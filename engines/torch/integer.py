"""Matrix products in integers: bytes for weights, 13 bits for activations, sums without rounding.

Of a row x and an output's weights W_o, with K input features,

    x̂ = round(A · x / max|x|)          Ŵ_o = round(127 · W_o / max|W_o|)
    y_o = (max|x| / A) · (max|W_o| / 127) · Σ_i x̂_i · Ŵ_oi + b_o

A is 4095, or the largest number with which A · 127 · K stays below 2³¹. The sum is exact in int32
whatever its order, and everything around it is done element by element, so that a row's result is
bitwise the same whatever rows are run beside it (`engines.torch.kernels`). A pass reads each weight
once, one byte: up to three rows cost as much as reading them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.torch import kernels
from engines.torch.kernels import BLOCK, UNIT

_LARGEST_WEIGHT = 127
_TINY = 1e-30  # in place of a maximum of 0

Work = Callable[[int, int, npt.NDArray[np.int64]], None]


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """Matrices of one shape, one for each layer, as they are stored and multiplied.

    Attributes:
        weight: int8[layers, blocks, pairs, 16, 2]: of each 16 outputs, for each two inputs,
            their weights. Outputs and inputs are padded with zeros.
        scale: float32[layers, 16 · blocks], max|W_o| / 127.
        bias: float32[layers, 16 · blocks]; 0 where there is none.
        shape: output and input features.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> IntegerMatrix:
        """Round float32[out, in], as one layer."""
        num_out, num_in = weight.shape
        scale = weight.abs().amax(dim=1).clamp_min(_TINY) / _LARGEST_WEIGHT
        rounded = (weight / scale[:, None]).round_().to(torch.int8)
        more = -num_out % BLOCK
        padded = F.pad(rounded, (0, -num_in % UNIT, 0, more))
        bias = torch.zeros(num_out) if bias is None else bias
        return cls(
            _packed(padded)[None], F.pad(scale, (0, more))[None], F.pad(bias, (0, more))[None],
            (num_out, num_in),
        )  # fmt: skip

    @classmethod
    def stacked(cls, layers: Sequence[IntegerMatrix]) -> IntegerMatrix:
        """Matrices of one shape, layer after layer."""
        weight, scale, bias = (
            torch.cat([getattr(layer, part) for layer in layers])
            for part in ("weight", "scale", "bias")
        )
        return cls(weight, scale, bias, layers[0].shape)

    def rows(self, ids: Tensor) -> IntegerMatrix:
        """The outputs `ids` alone: int64[n]."""
        more = -len(ids) % BLOCK
        chosen = self.weight[:, ids // BLOCK, :, ids % BLOCK]  # [n, layers, pairs, 2]
        rows = F.pad(chosen.transpose(0, 1).flatten(2), (0, 0, 0, more))
        return IntegerMatrix(
            torch.stack([_packed(layer) for layer in rows]),
            F.pad(self.scale[:, ids], (0, more)), F.pad(self.bias[:, ids], (0, more)),
            (len(ids), self.shape[1]),
        )  # fmt: skip

    def plain(self) -> Tensor:
        """float32[layers, out, in], what the bytes stand for."""
        num_layers, blocks, pairs = self.weight.shape[:3]
        rows = self.weight.transpose(2, 3).reshape(num_layers, blocks * BLOCK, 2 * pairs)
        num_out, num_in = self.shape
        return rows[:, :num_out, :num_in].float() * self.scale[:, :num_out, None]

    @property
    def num_pairs(self) -> int:
        """Pairs of padded input features."""
        return int(self.weight.shape[2])

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return self.weight.numel()

    def operand(self) -> tuple[Any, ...]:
        """What `kernels.run` and `kernels.multiply` take; shares the memory."""
        largest = np.float32(kernels.largest_activation(2 * self.num_pairs))
        weight = self.weight.view(len(self.weight), -1).numpy()
        return weight, self.scale.numpy(), self.bias.numpy(), self.num_pairs, largest


class IntegerProduct:
    """A matrix ready to multiply: float32[…, in] → float32[…, out].

    Attributes:
        num_bytes: size of the weights.
    """

    def __init__(self, matrix: IntegerMatrix) -> None:
        """Of a matrix of one layer."""
        self.num_bytes = matrix.num_bytes
        self._matrix = matrix
        self._num_out = matrix.shape[0]
        self._padded_out = int(matrix.scale.shape[1])
        self._padded_in = 2 * matrix.num_pairs
        self._operand = matrix.operand()

    def __call__(self, rows: Tensor, /) -> Tensor:
        flat = rows.detach().reshape(-1, rows.shape[-1]).contiguous().numpy()
        rounded = np.empty((len(flat), self._padded_in), np.int16)
        steps = np.empty(len(flat), np.float32)
        out = np.empty((len(flat), self._padded_out), np.float32)

        def multiply(thread: int, num_threads: int, arrivals: npt.NDArray[np.int64]) -> None:
            kernels.multiply(
                thread, num_threads, arrivals, flat, self._operand, rounded, steps, out
            )

        on_all_threads(multiply)
        return torch.from_numpy(out)[:, : self._num_out].view(*rows.shape[:-1], self._num_out)

    def rows(self, ids: Tensor) -> Tensor:
        """As `engines.torch.linears.Matrix.rows`."""
        return self._matrix.rows(ids).plain()[0]


_own = threading.local()


def on_all_threads(work: Work) -> None:
    """Run `work(thread, num_threads, arrivals)` on as many threads as torch uses, at once.

    The calls wait for each other, so that each must have a thread of its own: every caller has a
    pool.
    """
    num_threads = torch.get_num_threads()
    arrivals = np.zeros(1, np.int64)
    if num_threads == 1:
        work(0, 1, arrivals)
        return
    if getattr(_own, "num_threads", 0) < num_threads:
        _own.pool, _own.num_threads = ThreadPoolExecutor(num_threads - 1), num_threads
    others = [
        _own.pool.submit(work, thread, num_threads, arrivals) for thread in range(1, num_threads)
    ]
    work(0, num_threads, arrivals)
    for other in others:
        other.result()


def _packed(rows: Tensor) -> Tensor:
    """int8[16·blocks, 2·pairs] → int8[blocks, pairs, 16, 2]."""
    num_out, num_in = rows.shape
    cut = rows.view(num_out // BLOCK, BLOCK, num_in // 2, 2)
    return cut.transpose(1, 2).contiguous()
