"""How weight matrices lie in memory when only a few rows at a time run through them.

A draft step multiplies one row with every matrix, a verification some 5 to 16. Both wait for the
weights more than for the arithmetic, and there torch's own float32 product is slow
(docs/results.md, by `e2sci bench overhead`). So matrices are kept in the layout of a library made
for it:

* `integer`: int8 weights and sums in integers: a quarter of the bytes, and bitwise the same result
  for a row whatever rows are beside it (`engines.torch.integer`). For both models.
* `halved`: float16 weights, float32 rows and sums, by FBGEMM: half the bytes. For drafts in
  float32, whose weights may be rounded once more (by at most 2⁻¹¹ of themselves, the same for every
  chunk of tokens, so that a draft stays a function of the prefix).
* `packed`: float32 weights in oneDNN's blocks; products differ from torch's own only by the order
  of summation. For targets in float32: faster from two rows on, no faster for a single one.

Several matrices that the same rows run through become one. Other number formats, GPUs and machines
without these libraries keep their weights as they were loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from engines.torch.integer import IntegerMatrix, IntegerProduct

_TYPICAL_ROWS = 8  # oneDNN picks its blocks for this many; they serve 1 to 16 alike


class Product(Protocol):
    """y = x·Wᵀ + b: float32[…, in] → float32[…, out].

    Attributes:
        num_bytes: size of the weights.
    """

    num_bytes: int

    def __call__(self, rows: Tensor, /) -> Tensor: ...


class Matrix(Product, Protocol):
    """A product whose weights can be read again."""

    def rows(self, ids: Tensor) -> Tensor:
        """float32[n, in]: the weights of outputs int64[n], as they are multiplied."""
        ...


Layout = Callable[[Sequence[nn.Linear]], Matrix]
"""Makes the products of the same rows with several matrices, one beside the other."""


def integer(linears: Sequence[nn.Linear]) -> Matrix:
    """In int8."""
    if not _float32_on_cpu(linears):
        return _AsLoaded(linears)
    return IntegerProduct(IntegerMatrix.of(*_joined(linears)))


def halved(linears: Sequence[nn.Linear]) -> Matrix:
    """In float16 where FBGEMM is there; numbers beyond its range become its largest."""
    possible = _float32_on_cpu(linears) and _has_fbgemm()
    return _Halved(linears) if possible else _AsLoaded(linears)


def packed(linears: Sequence[nn.Linear]) -> Matrix:
    """In float32 for a few rows where oneDNN is there."""
    possible = _float32_on_cpu(linears) and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return _Packed(linears) if possible else _AsLoaded(linears)


class _AsLoaded:
    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self._linears = linears
        self.num_bytes = sum(x.weight.numel() * x.weight.element_size() for x in linears)

    def __call__(self, rows: Tensor, /) -> Tensor:
        return torch.cat([linear(rows) for linear in self._linears], dim=-1)

    def rows(self, ids: Tensor) -> Tensor:
        """As `Matrix.rows`."""
        return torch.cat([linear.weight.detach() for linear in self._linears])[ids].float()


class _Halved:
    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weight, bias = _joined(linears)
        self._weight = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self.num_bytes = 2 * weight.numel()

    def __call__(self, rows: Tensor, /) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(rows, self._weight)
        return product

    def rows(self, ids: Tensor) -> Tensor:
        """As `Matrix.rows`."""
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self._weight)[0]
        return weight[ids]


class _Packed:
    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weight, self._bias = _joined(linears)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
        self.num_bytes = 4 * weight.numel()

    def __call__(self, rows: Tensor, /) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, "none", [], ""
        )
        return product

    def rows(self, ids: Tensor) -> Tensor:
        """As `Matrix.rows`."""
        weight: Tensor = self._weight.to_dense()
        return weight[ids]


class ProductModule(nn.Module):
    """A product in the place of an `nn.Linear`."""

    def __init__(self, linear: nn.Linear, layout: Layout) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.product = layout([linear])

    def forward(self, rows: Tensor) -> Tensor:
        return self.product(rows)


def replace_linears(model: nn.Module, layout: Layout) -> None:
    """Give every `nn.Linear` of a model another layout, in place.

    Plain weights are freed one by one. Only a head tied to the input embedding is held twice
    afterwards: the embedding's rows are looked up, the head's are multiplied. Models in other
    formats than float32 on a CPU are left alone.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and _float32_on_cpu([child]):
                setattr(parent, name, ProductModule(child, layout))


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def _joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases one beside the other; matrices of a group have all a bias or none."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return weight, torch.cat(biases) if biases else None


def _float32_on_cpu(linears: Sequence[nn.Linear]) -> bool:
    return all(x.weight.dtype == torch.float32 and x.weight.device.type == "cpu" for x in linears)
