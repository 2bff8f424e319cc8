"""What can happen to a session at the edge, and what the edge's machine asks of its shell.

Times are milliseconds on the shell's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from bus.arrays import Float16Array, Int32Array
from bus.messages import ControlUpdate, Fault, Feedback, FinishReason, Message, SessionReady

# --- events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """A peer is chosen, with the target's end tokens; open the session there."""

    eos: frozenset[int]
    now_ms: float


@dataclass(frozen=True, slots=True)
class Opened:
    """`SessionReady` arrived."""

    message: SessionReady
    now_ms: float


@dataclass(frozen=True, slots=True)
class Drafted:
    """The draft thread delivers n ≥ 0 tokens (fewer than asked after an EOS or an interrupt).

    Attributes:
        job: of the `Draft` this answers; an answer to an older one is ignored.
        start: absolute position of the first token.
        q_ids: int32[n, K]. q_probs: float16[n, K], as they will be sent.
    """

    job: int
    start: int
    tokens: tuple[int, ...]
    q_ids: Int32Array
    q_probs: Float16Array
    draft_ms: float
    now_ms: float


@dataclass(frozen=True, slots=True)
class FeedbackArrived:
    message: Feedback
    now_ms: float


@dataclass(frozen=True, slots=True)
class ControlArrived:
    message: ControlUpdate
    now_ms: float


@dataclass(frozen=True, slots=True)
class FaultArrived:
    message: Fault
    now_ms: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes; resend what is overdue."""

    now_ms: float


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The cloud worker is gone from the registry, or another process has taken its name."""

    now_ms: float


@dataclass(frozen=True, slots=True)
class StopMatched:
    """A stop string was completed by generated token number `num_generated` (counted from 1)."""

    num_generated: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The shell ends the session: cancelled by its user, or an error outside the machine."""

    reason: FinishReason
    error: str = ""


Event = (
    Started
    | Opened
    | Drafted
    | FeedbackArrived
    | ControlArrived
    | FaultArrived
    | Tick
    | PeerLost
    | StopMatched
    | Ended
)

# --- effects ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Draft:
    """Run `feed` (never empty), then draft `count` tokens."""

    job: int
    feed: tuple[int, ...]
    count: int


@dataclass(frozen=True, slots=True)
class Crop:
    """Cut the draft's cache to `length` tokens."""

    length: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send to the session's cloud worker."""

    message: Message


@dataclass(frozen=True, slots=True)
class Commit:
    """Promise `tokens` to the user; the first is generated token number `start` (from 0).

    `accepted[i]` tells whether token i was drafted (else it is the target's own).
    """

    start: int
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class WindowJudged:
    """Facts of one judged window, for telemetry."""

    feedback: Feedback
    num_drafted: int
    num_committed: int
    rolled_back: bool
    window: int
    credit: float
    draft_ms: float
    rtt_ms: float


@dataclass(frozen=True, slots=True)
class CheckPeer:
    """The peer has not answered for a while: look it up; answer `PeerLost` if it is gone."""


@dataclass(frozen=True, slots=True)
class SeekPeer:
    """Find another cloud worker and answer `Started`."""

    why: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The session is over; nothing follows. The cache may be freed."""

    reason: FinishReason
    error: str = ""


Effect = Draft | Crop | Send | Commit | WindowJudged | CheckPeer | SeekPeer | Finish
