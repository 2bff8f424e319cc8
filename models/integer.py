"""Matrix products in integers: int8 weights, 7-bit activations, sums without rounding.

A row x and a matrix W are cut into the same groups of input features. In each group g

    x̂ = round(63 · x / max|x|)          Ŵ_o = round(127 · W_o / max|W_o|) for each output o
    y_o = Σ_g (max|x| / 63) · (max|W_o| / 127) · Σ_i x̂_i · Ŵ_oi

The inner sum is exact in int32 whatever its order, and everything around it is done element by
element, so that a row's result is bitwise the same whatever rows are run beside it. torch's FBGEMM
rounds x, multiplies and scales in one pass over the weights, one byte each: a few rows cost little
more than reading them.

Activations have 7 bits and not 8: without VNNI two products are added in int16, and
2 · 127 · 127 = 32,258 is the most that fits.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_WEIGHT = 127.0
_LARGEST_ACTIVATION = 63.0
_ZERO_POINT = 64
GROUP = 2048
"""Most input features of a group [ours]; docs/int8.md has the measurements."""
_TINY = 1e-30  # in place of max|x| = 0: such a group's products are 0


def available() -> bool:
    """Whether torch has FBGEMM here."""
    return "fbgemm" in torch.backends.quantized.supported_engines


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """Ŵ and its scales, as they are stored.

    Attributes:
        weight: int8[out, in].
        scale: float32[groups, out], max|W_o| / 127 of each group.
        bias: float32[out] or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, num_groups: int, bias: Tensor | None = None) -> IntegerMatrix:
        """Round float32[out, in]; `in` is a multiple of the number of groups."""
        num_out, num_in = weight.shape
        groups = weight.view(num_out, num_groups, num_in // num_groups)
        scale = groups.abs().amax(dim=2).clamp_min(_TINY) / _LARGEST_WEIGHT
        rounded = (groups / scale[:, :, None]).round_().clamp_(-127, 127).to(torch.int8)
        return cls(rounded.view(num_out, num_in), scale.T.contiguous(), bias)

    @property
    def num_groups(self) -> int:
        return int(self.scale.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input features."""
        num_out, num_in = self.weight.shape
        return int(num_out), int(num_in)

    def rows(self, ids: Tensor) -> IntegerMatrix:
        """The outputs `ids` alone: int64[n]."""
        bias = None if self.bias is None else self.bias[ids]
        return IntegerMatrix(self.weight[ids], self.scale[:, ids], bias)


class IntegerProduct:
    """y = x·Wᵀ + b of an `IntegerMatrix`: float32[n, in] → float32[n, out].

    Attributes:
        num_bytes: size of the weights.
    """

    def __init__(self, matrix: IntegerMatrix) -> None:
        num_out, num_in = matrix.shape
        self._width = num_in // matrix.num_groups
        self._packed = [
            _prepacked(part.contiguous(), scale)
            for part, scale in zip(
                torch.split(matrix.weight, self._width, dim=1), matrix.scale, strict=True
            )
        ]
        self._bias = matrix.bias
        self.num_bytes = num_out * num_in

    def __call__(self, rows: Tensor, /) -> Tensor:
        groups = rows.reshape(-1, len(self._packed), self._width)
        peaks = groups.abs().amax(dim=2, keepdim=True).clamp_min_(_TINY)
        scaled = groups / peaks
        total: Tensor | None = None
        for group, weight in enumerate(self._packed):
            product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                scaled[:, group], 1 / _LARGEST_ACTIVATION, _ZERO_POINT, weight
            )
            product *= peaks[:, group]
            total = product if total is None else total.add_(product)
        assert total is not None
        if self._bias is not None:
            total += self._bias
        return total.view(*rows.shape[:-1], -1)


def num_groups(size: int, largest: int = GROUP) -> int:
    """The fewest equal groups of at most `largest` features and a multiple of 16 each; 1 where
    there are none such."""
    for count in range(-(-size // largest), size // 16 + 1):
        if size % (16 * count) == 0:
            return count
    return 1


def joined(matrices: Sequence[IntegerMatrix]) -> IntegerMatrix:
    """Matrices of the same rows one beside the other; all have a bias or none has."""
    biases = [matrix.bias for matrix in matrices if matrix.bias is not None]
    return IntegerMatrix(
        torch.cat([matrix.weight for matrix in matrices]),
        torch.cat([matrix.scale for matrix in matrices], dim=1),
        torch.cat(biases) if biases else None,
    )


def _prepacked(weight: Tensor, scale: Tensor) -> object:
    """FBGEMM's form of int8[out, in] with float32[out] scales."""
    with warnings.catch_warnings():  # torch announces that it will drop quantised tensors
        warnings.simplefilter("ignore", UserWarning)
        quantised = torch._make_per_channel_quantized_tensor(
            weight, scale.double(), torch.zeros(len(scale), dtype=torch.long), 0
        )
        packed: object = torch.ops.quantized.linear_prepack(quantised, None)
    return packed
