"""How long a pass takes by its rows, as measured, and how large a chunk of a prompt may be."""

from __future__ import annotations

import math

import numpy as np

SMALLEST_CHUNK, LARGEST_CHUNK = 4, 256
FIRST_CHUNK = 64
"""Rows of a prompt in a pass where nobody else waits, before anything is known."""
_SIZES = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_NEW = 0.2  # weight of a measurement against those before it
_WASTE = 1.05  # where nobody waits, a row may cost so many times what it costs in the best chunk


class PassCosts:
    """Mean times by number of rows, in half octaves: passes of one size say nothing of others."""

    def __init__(self) -> None:
        self._means: dict[int, tuple[float, float]] = {}

    def add(self, num_rows: int, ms: float) -> None:
        """A pass was measured."""
        key = round(2 * math.log2(num_rows))
        rows, mean_ms = self._means.get(key, (float(num_rows), ms))
        self._means[key] = (rows + _NEW * (num_rows - rows), mean_ms + _NEW * (ms - mean_ms))

    def estimate(self, num_rows: int) -> float:
        """Milliseconds of a pass: between measured sizes linear, beyond them in proportion."""
        rows, ms = np.array(sorted(self._means.values())).T
        rising = np.maximum.accumulate(ms)
        if num_rows > rows[-1]:
            return float(rising[-1] * num_rows / rows[-1])
        return float(np.interp(num_rows, rows, rising))

    def chunk(self, num_others: int) -> int:
        """Rows of prompts for a pass beside `num_others` rows of windows.

        The pass then lasts at most about twice what it would last without them. Without others, it
        is the shortest chunk of which a row costs about what it costs in the best. Sizes are tried
        up to twice the largest measured.
        """
        if not self._means:
            return SMALLEST_CHUNK if num_others else FIRST_CHUNK
        known = 2 * max(rows for rows, _ in self._means.values())
        able = [size for size in _SIZES if num_others + size <= known]
        if num_others:
            limit_ms = 2 * self.estimate(num_others)
            able = [size for size in able if self.estimate(num_others + size) <= limit_ms]
            return max(able, default=SMALLEST_CHUNK)
        costs = {size: self.estimate(size) / size for size in able}
        best = min(costs.values(), default=0.0)
        return min((s for s in able if costs[s] <= _WASTE * best), default=SMALLEST_CHUNK)
