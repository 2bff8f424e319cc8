"""How much one caller, and all together, may ask for."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from gateway.errors import RATE, RETRY_S, ApiError

__all__ = ["RateLimit", "Slots"]

_MAX_CALLERS = 10_000


class RateLimit:
    """A token bucket for each caller: it holds a minute's requests and fills evenly.

    Args:
        per_minute: requests; 0 lets everything pass.
        clock: seconds, monotonic.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> None:
        """Count one request.

        Raises:
            ApiError: 429; the caller's bucket is empty.
        """
        if not self._per_minute:
            return
        rate, now = self._per_minute / 60, self._clock()
        level, at = self._buckets.pop(caller, (float(self._per_minute), now))
        level = min(self._per_minute, level + (now - at) * rate)
        taken = level >= 1
        self._buckets[caller] = (level - 1 if taken else level, now)
        if len(self._buckets) > _MAX_CALLERS:
            self._buckets.popitem(last=False)
        if not taken:
            raise ApiError(
                429,
                f"more than {self._per_minute} requests a minute; wait as Retry-After says",
                kind=RATE,
                code="rate_limit_exceeded",
                retry_after_s=(1 - level) / rate,
            )


class Slots:
    """Choices that are generated now, against their limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0

    def take(self, count: int) -> None:
        """Raises ApiError: 429; `count` more are too many."""
        if self.used + count > self._limit:
            raise ApiError(
                429,
                f"{self.used} answers are being generated here, the limit is {self._limit}; "
                "try again in a moment",
                kind=RATE,
                code="too_many_streams",
                retry_after_s=RETRY_S,
            )
        self.used += count

    def give_back(self, count: int) -> None:
        self.used -= count
