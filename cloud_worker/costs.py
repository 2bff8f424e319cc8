"""How long a pass takes by its rows, as measured, and how large a chunk of a prompt may be."""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST_CHUNK, LARGEST_CHUNK = 8, 256
FIRST_CHUNK = 64
"""Rows of a prompt in a pass, before anything is known."""
_MEMORY = 0.98  # weight of a pass, against that of the one after it
_WASTE = 0.05  # share of a pass that a prompt may spend on reading weights, where nobody waits


@dataclass(slots=True)
class PassCosts:
    """Least squares of ms = fixed + each · rows, older passes weighing less."""

    weight: float = 0.0
    rows: float = 0.0
    ms: float = 0.0
    rows_squared: float = 0.0
    rows_ms: float = 0.0

    def add(self, num_rows: int, ms: float) -> None:
        """A pass was measured."""
        self.weight = _MEMORY * self.weight + 1
        self.rows = _MEMORY * self.rows + num_rows
        self.ms = _MEMORY * self.ms + ms
        self.rows_squared = _MEMORY * self.rows_squared + num_rows**2
        self.rows_ms = _MEMORY * self.rows_ms + num_rows * ms

    def chunk(self, num_others: int) -> int:
        """Rows of prompts for a pass beside `num_others` rows of windows.

        The pass then lasts at most about twice what it would last without them. Without others it
        is as long as makes reading the weights a small share of it.
        """
        spread = self.weight * self.rows_squared - self.rows**2
        if spread <= 1e-9 * self.weight * self.rows_squared:
            return FIRST_CHUNK if num_others == 0 else SMALLEST_CHUNK
        each = max((self.weight * self.rows_ms - self.rows * self.ms) / spread, 1e-9)
        fixed = max((self.ms - each * self.rows) / self.weight, 0.0)
        most = fixed / each + num_others if num_others else fixed / each / _WASTE
        return round(min(max(most, SMALLEST_CHUNK), LARGEST_CHUNK))
