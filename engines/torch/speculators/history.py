"""What a session's passes gave its speculator: one row for each position of the target's cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bus.protocol.errors import LocalError

_BLOCK = 256  # rows reserved at a time


class History:
    """Rows of positions 0 … length−1, in float16, as half the memory is enough for numbers that a
    norm has scaled. It is kept in step with the target's cache (`engines.torch.cache.KVCache`)."""

    __slots__ = ("_rows", "length")

    def __init__(self, width: int) -> None:
        self._rows = torch.empty(0, width, dtype=torch.float16)
        self.length = 0

    def append(self, rows: Tensor) -> None:
        """The rows float32[n, width] of the positions that follow."""
        end = self.length + len(rows)
        if end > len(self._rows):
            self._reserve(max(end, 3 * self.length // 2))
        self._rows[self.length : end] = rows
        self.length = end

    def keep(self, length: int, path: Sequence[int] = ()) -> None:
        """As `KVCache.keep`, whose checks it relies on."""
        end = length + len(path)
        if end > self.length:
            raise LocalError(f"cannot keep {end} rows of {self.length}")
        if list(path) != list(range(len(path))):
            self._rows[length:end] = self._rows[torch.tensor(path) + length]
        self.length = end

    def rows(self, begin: int, end: int) -> Tensor:
        """float32[end − begin, width]."""
        return self._rows[begin:end].float()

    @torch.inference_mode(False)  # else only passes in inference mode could write into the rows
    def _reserve(self, length: int) -> None:
        """Room for `length` rows and more, with those held in front."""
        grown = self._rows.new_empty(-(-length // _BLOCK) * _BLOCK, self._rows.shape[1])
        grown[: self.length] = self._rows[: self.length]
        self._rows = grown
