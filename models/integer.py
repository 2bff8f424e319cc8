"""Matrix products in integers: bytes for weights and activations, sums without rounding.

A row x and a matrix W are cut into the same groups of input features. In each group g

    x̂ = round(90 · x / max|x|)          Ŵ_o = round(91 · W_o / max|W_o|) for each output o
    y_o = Σ_g (max|x| / 90) · (max|W_o| / 91) · Σ_i x̂_i · Ŵ_oi

The inner sum is exact in int32 whatever its order, and everything around it is done element by
element, so that a row's result is bitwise the same whatever rows are run beside it. torch's FBGEMM
rounds x, multiplies and scales in one pass over the weights, one byte each: a few rows cost little
more than reading them.

Why 90 and 91: FBGEMM shifts x̂ to 0 … 180, and without VNNI it adds two products in int16, of which
2 · 180 · 91 = 32,760 is the most that fits. Equal shares lose least (docs/int8.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from models.rowwise import scripted

_LARGEST_WEIGHT = 91.0
GROUP = 2048
"""Most input features of a group [ours]; docs/int8.md has the measurements."""
_TINY = 1e-30  # in place of a maximum of 0: such a group's products are 0


def available() -> bool:
    """Whether torch has FBGEMM here."""
    return "fbgemm" in torch.backends.quantized.supported_engines


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """Ŵ and its scales, as they are stored.

    Attributes:
        weight: int8[out, in].
        scale: float32[groups, out], max|W_o| / 91 of each group.
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
        rounded = (groups / scale[:, :, None]).round_().clamp_(-91, 91).to(torch.int8)
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


if TYPE_CHECKING:
    Packed: TypeAlias = object
else:
    Packed = torch.classes.quantized.LinearPackedParamsBase  # FBGEMM's form of a group's weights


@scripted
def product(
    rows: Tensor,
    groups: list[Packed],
    bias: Tensor | None,
) -> Tensor:
    """x·Wᵀ + b: float32[n, in] → float32[n, out].

    Args:
        groups: W, group by group of equal width. bias: float32[out].
    """
    parts = rows.view(rows.shape[0], len(groups), -1)
    peaks = parts.abs().amax([2], keepdim=True).clamp_min_(1e-30)
    scaled = parts / peaks
    total: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        scaled[:, 0], 1.0 / 90, 90, groups[0]
    ).mul_(peaks[:, 0])
    for index in range(1, len(groups)):
        total += torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            scaled[:, index], 1.0 / 90, 90, groups[index]
        ).mul_(peaks[:, index])
    if bias is not None:
        total += bias
    return total


class IntegerProduct:
    """A matrix ready to multiply: float32[…, in] → float32[…, out].

    Attributes:
        groups, bias: as `product` takes them.
        num_bytes: size of the weights.
    """

    def __init__(self, matrix: IntegerMatrix) -> None:
        num_out, num_in = matrix.shape
        width = num_in // matrix.num_groups
        parts = torch.split(matrix.weight, width, dim=1)
        self.groups = [
            _prepacked(part.contiguous(), scale)
            for part, scale in zip(parts, matrix.scale, strict=True)
        ]
        self.bias = matrix.bias
        self.num_bytes = num_out * num_in

    def __call__(self, rows: Tensor, /) -> Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        return product(flat, self.groups, self.bias).view(*rows.shape[:-1], -1)


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


def _prepacked(weight: Tensor, scale: Tensor) -> Packed:
    """FBGEMM's form of int8[out, in] with float32[out] scales."""
    with warnings.catch_warnings():  # torch announces that it will drop quantised tensors
        warnings.simplefilter("ignore", UserWarning)
        quantised = torch._make_per_channel_quantized_tensor(
            weight, scale.double(), torch.zeros(len(scale), dtype=torch.long), 0
        )
        packed: Packed = torch.ops.quantized.linear_prepack(quantised, None)
    return packed
