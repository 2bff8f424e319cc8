"""Smoothed round-trip estimates and the resend timeout, as TCP does it (RFC 6298)."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

INITIAL_TIMEOUT_MS = 1000.0
MIN_TIMEOUT_MS = 200.0
MAX_TIMEOUT_MS = 5000.0


class ReplyTimer(Struct, frozen=True):
    """How long a reply usually takes, verification and queueing included.

    Attributes:
        smoothed_ms: exponentially smoothed reply time (gain 1/8); None before the first sample.
        variation_ms: smoothed absolute deviation (gain 1/4).
    """

    smoothed_ms: float | None = None
    variation_ms: float = 0.0

    def sample(self, reply_ms: float) -> ReplyTimer:
        """With one more measured reply; resent windows must not be sampled (Karn)."""
        if self.smoothed_ms is None:
            return replace(self, smoothed_ms=reply_ms, variation_ms=reply_ms / 2)
        deviation = abs(self.smoothed_ms - reply_ms)
        return ReplyTimer(
            smoothed_ms=self.smoothed_ms + (reply_ms - self.smoothed_ms) / 8,
            variation_ms=self.variation_ms + (deviation - self.variation_ms) / 4,
        )

    def timeout_ms(self, num_sends: int) -> float:
        """How long to wait after send number `num_sends` (from 1), doubling each time."""
        if self.smoothed_ms is None:
            base = INITIAL_TIMEOUT_MS
        else:
            base = max(MIN_TIMEOUT_MS, self.smoothed_ms + 4 * self.variation_ms)
        return min(base * 2.0 ** (num_sends - 1), MAX_TIMEOUT_MS)
