"""Medusa: heads on the target's last hidden state, each for a token further on.

Cai et al. 2024, arXiv 2401.10774. With h the state of the last position run, after the last norm
without its gain, head k = 0, 1, … gives the distribution of the k-th token after the next:

    y_k = h + SiLU(W_k h + b_k)        logits_k = (the target's head rows of `vocab`) ∘ g · y_k

with g the last norm's gain. As position i is the last one run, and the token at i+1 is known, head
k is about position i + 2 + k. A path's probability is the product of its tokens'.

On a target whose hidden states are rotated, h·Q, the heads' inputs are rotated as well, their
outputs once by a product with Q.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.engine import NO_ROWS, ProposedTree
from engines.torch.linears import Matrix
from engines.torch.network import CausalNetwork
from engines.torch.speculators.base import BRANCHES, MOST_DEPTH, product
from engines.torch.speculators.file import MedusaConfig, SpeculatorFile
from engines.torch.speculators.history import History
from engines.torch.speculators.tree import NUM_SPARSE, Level, best_by_depth


class Medusa:
    """Heads on one target.

    Attributes:
        num_heads: how many.
        Others as in `engines.torch.speculators.base.Speculator`.
    """

    layers: tuple[int, ...] = ()

    def __init__(self, file: SpeculatorFile, network: CausalNetwork) -> None:
        """Of a file whose config fits the target."""
        assert isinstance(file.config, MedusaConfig)
        body, head = network.own
        tensors = file.tensors()
        self.branches = BRANCHES
        self.num_heads, self.hidden = file.config.num_heads, file.config.hidden
        weights = [tensors[f"heads.{k}.weight"] for k in range(self.num_heads)]
        self._basis: Matrix | None = None
        if body.basis is not None:
            weights = [weight @ body.basis for weight in weights]
            self._basis = product(body.basis.T.contiguous())
        biases = [tensors[f"heads.{k}.bias"] for k in range(self.num_heads)]
        self._heads = product(torch.cat(weights), torch.cat(biases))
        rows = head.rows(file.vocab)
        self._logits = product(rows if body.gain is None else rows * body.gain)
        self._vocab = file.vocab.numpy()

    def open(self) -> MedusaMemory:
        """For a new session."""
        return MedusaMemory(self)

    def levels(self, last: Tensor, begin: int, end: int, size: int) -> Level:
        """The `size` most probable tokens by heads `begin` … `end`−1 on float32[hidden]."""
        raised = F.silu(self._heads(last[None]).view(self.num_heads, -1)[begin:end])
        states = last + (raised if self._basis is None else self._basis(raised))
        return Level.of(self._logits(states), self._vocab, size)


class MedusaMemory:
    """A session's last hidden states."""

    def __init__(self, speculator: Medusa) -> None:
        self._speculator = speculator
        self._last = History(speculator.hidden)

    def ran(self, streams: Tensor, last: Tensor) -> None:
        """As `engines.torch.speculators.base.Memory.ran`."""
        del streams
        self._last.append(last)

    def keep(self, length: int, path: Sequence[int]) -> None:
        """As `Memory.keep`."""
        self._last.keep(length, path)

    def propose(
        self, held: Sequence[int], feed: Sequence[int], most: int, rows: bool
    ) -> ProposedTree:
        """As `Memory.propose`. A head for each token of the feed but the first is passed over."""
        speculator, length = self._speculator, len(held)
        begin = len(feed) - 1
        end = min(speculator.num_heads, begin + most, begin + MOST_DEPTH)
        if begin >= end:
            return ProposedTree((), (), *NO_ROWS)
        size = max(NUM_SPARSE, speculator.branches) if rows else speculator.branches
        level = speculator.levels(self._last.rows(length - 1, length)[0], begin, end, size)
        return best_by_depth(level, most, speculator.branches).tree(most, rows)
