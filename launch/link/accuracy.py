"""By how much the link was late: what it held back against what it should have."""

from __future__ import annotations

from collections import deque

import msgspec
import numpy as np

__all__ = ["Lateness", "LinkReport"]

KEPT = 100_000


class LinkReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a link did, printed as one line of JSON when it ends.

    Attributes:
        connections: accepted so far.
        bytes_up, bytes_down: payload delivered from edge to cloud and back.
        releases: deliveries, each at a time of its own.
        resent: packets that were lost and sent again.
        late_median_ms, late_p99_ms: actual minus scheduled release, of the last 100,000; None
            where there was none. Never negative.
        late_max_ms: of all.
        realtime: the kernel gave it real-time priority.
    """

    connections: int
    bytes_up: int
    bytes_down: int
    releases: int
    resent: int
    late_median_ms: float | None
    late_p99_ms: float | None
    late_max_ms: float | None
    realtime: bool


class Lateness:
    """Actual minus scheduled release, in nanoseconds."""

    def __init__(self) -> None:
        self.count = 0
        self._max_ns = 0
        self._recent_ns: deque[int] = deque(maxlen=KEPT)

    def add(self, late_ns: int) -> None:
        self.count += 1
        self._max_ns = max(self._max_ns, late_ns)
        self._recent_ns.append(late_ns)

    def summary_ms(self) -> tuple[float | None, float | None, float | None]:
        """Median, 99th percentile, maximum; None each where there was nothing."""
        if not self.count:
            return None, None, None
        median, p99 = np.percentile(np.fromiter(self._recent_ns, np.int64), [50, 99]) / 1e6
        return round(float(median), 4), round(float(p99), 4), round(self._max_ns / 1e6, 4)
