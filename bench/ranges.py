"""A value and the range around it, as people read it."""

from __future__ import annotations

import msgspec


def with_range(value: float, low: float, high: float) -> str:
    """`12.3 (11.9–12.8)`, below 10 with two decimals."""
    digits = 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


class Interval(msgspec.Struct, frozen=True):
    """A value and its 95 % interval; NaN where there is nothing to go by."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return with_range(self.value, self.low, self.high)
