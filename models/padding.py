"""Passes of a set least time, to measure as on another device.

A model that is faster than the device to be measured sleeps for the rest of the time. Where it is
slower it overruns, which is counted so that a reader sees whether the padding held; then everything
has to be slowed down by the same factor, the link included.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np

from bus.errors import ConfigurationError

_MOST_MS = 60_000.0


@dataclass(frozen=True, slots=True)
class LeastTimes:
    """The least time of a pass over n tokens: linear between given points, with the slope of the
    last two beyond them and constant before the first.

    Attributes:
        points: pairs of a number of tokens, rising, and milliseconds; none stands for no padding.
    """

    points: tuple[tuple[int, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """One number of ms for passes of any length (`130`), or points (`1:130,2:135,8:190`).

        Raises:
            ConfigurationError: it is neither.
        """
        parts = text.split(",")
        try:
            if len(parts) == 1 and ":" not in text:
                points = [(1, float(text))]
            else:
                points = [(int(n), float(ms)) for n, ms in (part.split(":") for part in parts)]
        except ValueError:
            points = []
        rising = all(before[0] < after[0] for before, after in pairwise(points))
        if not points or points[0][0] < 1 or not rising or not all(map(_fits, points)):
            raise ConfigurationError(
                f"least times {text!r}: expected ms such as 130, or TOKENS:MS with rising TOKENS "
                f"such as 1:130,2:135,8:190, each 0 … {_MOST_MS:g} ms"
            )
        return cls() if points == [(1, 0.0)] else cls(tuple(points))

    def __str__(self) -> str:
        """As `parse` takes it."""
        if not self.points:
            return "0"
        if len(self.points) == 1 and self.points[0][0] == 1:
            return f"{self.points[0][1]:g}"
        return ",".join(f"{num_tokens}:{ms:g}" for num_tokens, ms in self.points)

    def __bool__(self) -> bool:
        return bool(self.points)

    def of(self, num_tokens: int) -> float:
        """Least milliseconds of a pass over so many tokens."""
        if not self.points:
            return 0.0
        if num_tokens <= self.points[0][0] or len(self.points) == 1:
            return self.points[0][1]
        segments = list(pairwise(self.points))
        (n0, ms0), (n1, ms1) = next((s for s in segments if num_tokens <= s[1][0]), segments[-1])
        slope = (ms1 - ms0) / (n1 - n0)
        if num_tokens > n1:  # noise of a measurement must not make longer passes shorter
            return ms1 + max(0.0, slope) * (num_tokens - n1)
        return ms0 + slope * (num_tokens - n0)


NO_PADDING = LeastTimes()


def _fits(point: tuple[int, float]) -> bool:
    return 0.0 <= point[1] <= _MOST_MS


class Counts:
    """How many passes were padded and how many overran, in a file that another process reads.

    Args:
        path: of 16 bytes; made if it is not there. One process writes it.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(16))
        self._counts = np.memmap(path, dtype=np.int64, mode="r+", shape=(2,))

    def add(self, overran: bool) -> None:
        """One pass more."""
        self._counts += (1, overran)


def read_counts(path: Path) -> tuple[int, int]:
    """Passes so far, and how many of them overran; none where there is no file."""
    if not path.exists():
        return 0, 0
    total, overran = np.fromfile(path, dtype=np.int64, count=2)
    return int(total), int(overran)


class Padding:
    """Makes passes last at least a set time.

    Args:
        least: for how long. counts: where overruns are counted.
    """

    def __init__(self, least: LeastTimes = NO_PADDING, counts: Path | None = None) -> None:
        self._least = least
        self._counts = Counts(counts) if counts is not None and least else None

    def wait(self, began: float, num_tokens: int = 1) -> None:
        """Sleep until the least time of a pass over `num_tokens` that began at `began`, a
        `time.perf_counter()`, is over; not at all if it is."""
        if not self._least:
            return
        left = began + self._least.of(num_tokens) / 1e3 - time.perf_counter()
        if self._counts is not None:
            self._counts.add(overran=left < 0)
        if left > 0:
            time.sleep(left)
