"""What a target asks of a speculator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from decoding.engine import ProposedTree
from engines.torch.linears import Matrix, integer

MOST_DEPTH = 7
"""Longest path that is proposed [EAGLE-2 and EAGLE-3 draft as deep]."""
BRANCHES = 4
"""Most children of a node."""


class Memory(Protocol):
    """What a speculator holds of one session, beside each position of the target's cache."""

    def ran(self, streams: Tensor, last: Tensor) -> None:
        """A pass has run n more positions.

        Args:
            streams: float32[n, layers, hidden] after the speculator's `layers`, last:
                float32[n, hidden], in the basis of the target's body.
        """
        ...

    def keep(self, length: int, path: Sequence[int]) -> None:
        """As `engines.torch.cache.KVCache.keep`, after it."""
        ...

    def propose(
        self, held: Sequence[int], feed: Sequence[int], most: int, rows: bool
    ) -> ProposedTree:
        """As `decoding.engine.Target.propose`, after at least one token held; its errors were
        raised."""
        ...


class Speculator(Protocol):
    """Weights ready to propose.

    Attributes:
        layers: after how many of the target's layers it reads the residual stream.
        branches: most children of a node, of the text too; 1 makes trees chains.
    """

    layers: tuple[int, ...]
    branches: int

    def open(self) -> Memory:
        """For a new session."""
        ...


def product(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """Products with float32[out, in], in int8 on a CPU."""
    num_out, num_in = weight.shape
    linear = torch.nn.Linear(num_in, num_out, bias=bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    return integer([linear])
