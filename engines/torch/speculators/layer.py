"""EAGLE-3's layer in int8, over a cache of its own (`engines.torch.kernels.run_layer`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.torch import kernels
from engines.torch.cache import KVCache
from engines.torch.integer import IntegerMatrix, on_all_threads
from engines.torch.rope import Rotation
from engines.torch.speculators.file import Eagle3Config

Floats = npt.NDArray[np.float32]


@dataclass(slots=True)
class Nodes:
    """Rows that run after the first `past` positions of a cache, each after its parent.

    Attributes:
        parents: of each the row it follows, −1: the last of those positions.
        positions: of each, for RoPE.
    """

    past: int
    parents: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, parent: int, position: int) -> int:
        """One more; its row."""
        self.parents.append(parent)
        self.positions.append(position)
        return len(self.parents) - 1

    @classmethod
    def chain(cls, begin: int, end: int) -> Nodes:
        """Positions `begin` … `end`−1 of a text."""
        return cls(begin, list(range(-1, end - begin - 1)), list(range(begin, end)))


class WideLayer:
    """A layer whose queries, keys and values read the embedding beside the residual stream."""

    def __init__(
        self, config: Eagle3Config, embedding: Tensor, qkv: Tensor, output: Tensor, gate_up: Tensor,
        down: Tensor,
    ) -> None:  # fmt: skip
        """Of float32 weights with all gains folded in; embedding: float[V, hidden]."""
        self._embedding = embedding
        matrices = tuple(IntegerMatrix.of(part) for part in (qkv, output, gate_up, down))
        self._layers = tuple(matrix.operand() for matrix in matrices)
        self._hidden, self._num_kv, self._width = (
            config.hidden, config.num_key_value_heads, config.head_dim
        )  # fmt: skip
        self._shape = (
            config.hidden, config.num_attention_heads, config.num_key_value_heads,
            config.head_dim, config.intermediate_size,
        )  # fmt: skip
        self._mixed = config.num_attention_heads * config.head_dim
        self._epsilon = np.float32(config.rms_norm_eps)
        self._rotation = Rotation.plain(config.head_dim, config.rope_theta)
        self._padded = int(matrices[3].scale.shape[1])
        self._widest_in = max(2 * matrix.num_pairs for matrix in matrices)
        self._widest_out = max(int(matrix.scale.shape[1]) for matrix in matrices)

    def run(self, tokens: Sequence[int], g: Floats, nodes: Nodes, cache: KVCache) -> Floats:
        """a: float32[n, hidden] of the last n nodes, whose keys and values are appended; those of
        the nodes before are in the cache.

        Args:
            tokens: n, of each node the one at the position after. g: float32[n, hidden].
        """
        size, total = len(tokens), len(nodes.parents)
        embedded = F.embedding(torch.tensor(tokens), self._embedding).float().numpy()
        x = np.zeros((size, self._padded), np.float32)
        x[:, : self._hidden] = g
        rotation = tuple(
            part[:, 0].contiguous().numpy() for part in self._rotation.at(nodes.positions)
        )
        addresses, capacity = cache.extend(size, 1, self._num_kv, self._width)
        held = addresses[:1].copy(), addresses[1:].copy(), np.array([capacity])
        rows = (
            np.zeros(total, np.int64), np.arange(nodes.past, nodes.past + total),
            np.full(total, nodes.past), np.array(nodes.parents),
        )  # fmt: skip
        work = self._work(total, nodes.past + total)

        def run(thread: int, num_threads: int, arrivals: npt.NDArray[np.int64]) -> None:
            kernels.run_layer(
                thread, num_threads, arrivals, embedded, x, total - size, self._layers, self._shape,
                self._epsilon, rotation, held, rows, work,
            )  # fmt: skip

        on_all_threads(run)
        return x[:, : self._hidden]

    def _work(self, num_rows: int, length: int) -> tuple[npt.NDArray[np.generic], ...]:
        """What the kernel works in."""
        num_threads = torch.get_num_threads()
        return (
            np.empty(num_rows * self._widest_in, np.int16),
            np.empty(num_rows, np.float32),
            np.empty(num_rows * self._widest_out, np.float32),
            np.empty(num_rows * self._mixed, np.float32),
            np.empty((num_threads, max(2 * self._hidden, self._mixed)), np.float32),
            np.empty((num_threads, length), np.float32),
            np.empty((num_threads, num_rows), np.int32),
        )
