"""Smoothed round-trip estimates and the resend timeout, as TCP does it (RFC 6298)."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

INITIAL_TIMEOUT_MS = 1000.0
MIN_TIMEOUT_MS = 200.0
MAX_TIMEOUT_MS = 5000.0
MAX_BACKOFF = 5
OPENING_TIMEOUT_MS = 100.0
"""Before `OpenSession` is repeated for the first time [ours]: a worker answers it without a pass,
and its first answer to an edge that has just subscribed may be lost."""
FIRST_PAUSE_MS = 100.0
LONGEST_PAUSE_MS = 2000.0
"""Before a worker that has just refused is asked again [ours]."""


def pause_before(num_setbacks: int) -> float:
    """Milliseconds to wait after that many refusals before this one; doubles each time."""
    return min(FIRST_PAUSE_MS * 2.0 ** min(num_setbacks, 16), LONGEST_PAUSE_MS)


def opening_timeout_ms(num_sends: int) -> float:
    """How long to wait after send number `num_sends` (from 1) of `OpenSession`; doubles."""
    return min(OPENING_TIMEOUT_MS * 2.0 ** (num_sends - 1), MAX_TIMEOUT_MS)


class ReplyTimer(Struct, frozen=True):
    """How long a reply usually takes, verification and queueing included.

    Attributes:
        smoothed_ms: exponentially smoothed reply time (gain 1/8); None before the first sample.
        variation_ms: smoothed absolute deviation (gain 1/4).
        backoff: doublings that stay in force: replies that took longer than the timeout give no
            sample, and without this no window would ever again be sent once (RFC 6298, 5.5-5.7).
    """

    smoothed_ms: float | None = None
    variation_ms: float = 0.0
    backoff: int = 0

    def sample(self, reply_ms: float) -> ReplyTimer:
        """With one more measured reply; resent windows must not be sampled (Karn)."""
        if self.smoothed_ms is None:
            return ReplyTimer(smoothed_ms=reply_ms, variation_ms=reply_ms / 2)
        deviation = abs(self.smoothed_ms - reply_ms)
        return ReplyTimer(
            smoothed_ms=self.smoothed_ms + (reply_ms - self.smoothed_ms) / 8,
            variation_ms=self.variation_ms + (deviation - self.variation_ms) / 4,
        )

    def answered_late(self, num_sends: int) -> ReplyTimer:
        """With a reply to something sent `num_sends` ≥ 2 times: keep that patience."""
        return replace(self, backoff=min(max(self.backoff, num_sends - 1), MAX_BACKOFF))

    def timeout_ms(self, num_sends: int) -> float:
        """How long to wait after send number `num_sends` (from 1), doubling each time."""
        if self.smoothed_ms is None:
            base = INITIAL_TIMEOUT_MS
        else:
            base = max(MIN_TIMEOUT_MS, self.smoothed_ms + 4 * self.variation_ms)
        return min(base * 2.0 ** (num_sends - 1 + self.backoff), MAX_TIMEOUT_MS)
