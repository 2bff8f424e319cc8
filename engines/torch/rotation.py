"""An orthogonal change of basis that spreads outliers before activations are rounded.

A few features of a language model's hidden state are far larger than the rest, so that rounding to
a common scale leaves little of the others. In another orthonormal basis all features are about as
large, and a decoder computes the same: with the norms' gains folded into the matrices behind them,
every matrix that reads the hidden state reads it rotated, and every one that writes it writes it
rotated (QuaRot, Ashkboos et al. 2024; SliceGPT, 2024). The same holds within each attention head
between value and output projection.

The basis of n = o·2^k features is DCT(o) ⊗ Hadamard(2^k), computed by additions and products of
single elements in a fixed order, so that a conversion gives the same bits on every machine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotate(rows: Tensor) -> Tensor:
    """x·Q of float32[…, n]."""
    size = rows.shape[-1]
    power = size & -size
    odd = size // power
    x = _hadamard(rows.reshape(-1, odd, power))
    if odd > 1:
        basis = _dct(odd)
        x = torch.stack(
            [_combination(x, [basis[row][column] for row in range(odd)]) for column in range(odd)],
            dim=1,
        )
    return x.reshape(rows.shape)


def _hadamard(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of the last dimension, a power of two, orthonormal."""
    size, half = x.shape[-1], 1
    while half < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((first + second, first - second), dim=-2).reshape(x.shape)
        half *= 2
    return x * (1.0 / math.sqrt(size))


def _combination(x: Tensor, factors: list[float]) -> Tensor:
    """Σ_i factors[i] · x[:, i], in this order."""
    total = x[:, 0] * factors[0]
    for index, factor in enumerate(factors[1:], start=1):
        total = total + x[:, index] * factor
    return total


def _dct(size: int) -> list[list[float]]:
    """The orthonormal DCT-II, row by row."""
    rows = []
    for k in range(size):
        norm = math.sqrt((1 if k == 0 else 2) / size)
        angles = [math.pi * (2 * i + 1) * k / (2 * size) for i in range(size)]
        rows.append([norm * math.cos(angle) for angle in angles])
    return rows
