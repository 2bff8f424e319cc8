"""The tree a speculator proposes: the candidates whose paths are most probable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bus.protocol.arrays import PROB_DTYPE, TOKEN_DTYPE, Float16Array, Int32Array
from decoding.engine import NO_ROWS, ProposedTree
from decoding.sampling import canonical
from engines.torch import kernels

NUM_SPARSE = 48
"""Most probabilities that a node's row holds; as many as an edge sends of a drafted token."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Level:
    """The most probable tokens of some distributions over V.

    Attributes:
        ids: int64[m, K], of each distribution, in falling order.
        log_probs: float32[m, K], at temperature 1.
    """

    ids: Ints
    log_probs: Floats

    @classmethod
    def of(cls, logits: Tensor, vocab: Ints, size: int) -> Level:
        """Of float32[m, H] logits of the tokens int64[H]; `size` entries each, at most H."""
        rows = np.ascontiguousarray(logits.numpy())
        shape = len(rows), min(size, rows.shape[1])
        places, log_probs = np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)
        kernels.most_probable(rows, places, log_probs)
        return cls(vocab[places], log_probs)

    def row(self, index: int, size: int) -> tuple[Int32Array, Float16Array]:
        """One distribution's `size` entries as they travel, in canonical order."""
        ids, probs = self.ids[index, :size], np.exp(self.log_probs[index, :size])
        return canonical(ids.astype(TOKEN_DTYPE), probs.astype(PROB_DTYPE))


@dataclass(slots=True)
class Candidates:
    """Nodes that may become part of the tree, each after its parent.

    Attributes:
        log_probs: of the path that ends at each node.
        levels: that each node was taken from, with the row of it.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    levels: list[tuple[Level, int]] = field(default_factory=list)

    def add(self, level: Level, row: int, parent: int, branches: int) -> None:
        """The `branches` most probable tokens of a distribution as children of a node, −1: of the
        text."""
        path = self.log_probs[parent] if parent >= 0 else 0.0
        depth = self.depths[parent] + 1 if parent >= 0 else 1
        for rank in range(min(branches, level.ids.shape[1])):
            self.tokens.append(int(level.ids[row, rank]))
            self.parents.append(parent)
            self.depths.append(depth)
            self.log_probs.append(path + float(level.log_probs[row, rank]))
            self.levels.append((level, row))

    def best(self, most: int) -> list[int]:
        """The `most` nodes of the most probable paths, a parent before its children and siblings in
        falling order: no child is more probable than its parent, which was added before it."""
        order = sorted(range(len(self.tokens)), key=lambda node: (-self.log_probs[node], node))
        return order[:most]

    def tree(self, most: int, rows: bool) -> ProposedTree:
        """The best `most` nodes."""
        nodes = self.best(most)
        places = {node: place for place, node in enumerate(nodes)}
        ids, probs = self._rows(nodes) if rows and nodes else NO_ROWS
        return ProposedTree(
            tuple(self.tokens[node] for node in nodes),
            tuple(places.get(self.parents[node], -1) for node in nodes),
            ids,
            probs,
        )

    def _rows(self, nodes: Sequence[int]) -> tuple[Int32Array, Float16Array]:
        size = min(level.ids.shape[1] for level, _ in (self.levels[node] for node in nodes))
        given = [self.levels[node][0].row(self.levels[node][1], size) for node in nodes]
        return np.stack([ids for ids, _ in given]), np.stack([probs for _, probs in given])


def best_by_depth(level: Level, most: int, branches: int) -> Candidates:
    """The most probable paths where each depth has one distribution, the same after every path.

    Args:
        level: row d is the distribution at depth d + 1.
    """
    found, waiting = Candidates(), [(0.0, -1)]
    while waiting and len(found.tokens) < most + branches:
        _, parent = heappop(waiting)
        depth = found.depths[parent] if parent >= 0 else 0
        if depth == len(level.ids):
            continue
        begin = len(found.tokens)
        found.add(level, depth, parent, branches)
        for node in range(begin, len(found.tokens)):
            heappush(waiting, (-found.log_probs[node], node))
    return found
