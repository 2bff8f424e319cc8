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

import msgspec
import numpy as np

from bus.protocol.errors import ConfigurationError

_MOST_MS = 60_000.0
_NUMBERS = 4  # of a tally


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


class Tally(msgspec.Struct, frozen=True):
    """Padded passes.

    Attributes:
        count: how many. long: those of them that took longer than their least time.
        least_s: sum of their least times. excess_s: of what the long ones took beyond it.
    """

    count: int = 0
    long: int = 0
    least_s: float = 0.0
    excess_s: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.count + other.count, self.long + other.long, self.least_s + other.least_s,
            self.excess_s + other.excess_s,
        )  # fmt: skip

    def __sub__(self, other: Tally) -> Tally:
        return self + Tally(-other.count, -other.long, -other.least_s, -other.excess_s)


class TallyFile:
    """A tally in a file that another process reads.

    Args:
        path: made if it is not there. One process at a time writes it.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_NUMBERS * 8))
        self._numbers = np.memmap(path, dtype=np.float64, mode="r+", shape=(_NUMBERS,))

    def add(self, least_s: float, excess_s: float) -> None:
        """One pass more; a negative excess is the time that it slept."""
        self._numbers += (1.0, excess_s > 0, least_s, max(0.0, excess_s))


def read_tally(path: Path) -> Tally:
    """What has been counted so far; nothing where there is no file."""
    if not path.exists():
        return Tally()
    count, long, least_s, excess_s = np.fromfile(path, dtype=np.float64, count=_NUMBERS).tolist()
    return Tally(int(count), int(long), least_s, excess_s)


class Padding:
    """Makes passes last at least a set time.

    Args:
        least: for how long. counts: file of the tally, or None.
    """

    def __init__(self, least: LeastTimes = NO_PADDING, counts: Path | None = None) -> None:
        self._least = least
        self._counts = TallyFile(counts) if counts is not None and least else None

    def wait(self, began: float, num_tokens: int = 1) -> None:
        """Sleep until the least time of a pass over `num_tokens` that began at `began`, a
        `time.perf_counter()`, is over; not at all if it is."""
        if not self._least:
            return
        least_s = self._least.of(num_tokens) / 1e3
        left_s = began + least_s - time.perf_counter()
        if self._counts is not None:
            self._counts.add(least_s, -left_s)
        if left_s > 0:
            time.sleep(left_s)
