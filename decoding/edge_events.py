"""What can happen to a session at the edge, and what the edge's machine asks of its shell.

Times are milliseconds on the shell's monotonic clock.
"""

from __future__ import annotations

from msgspec import Struct

from bus.protocol.arrays import Float16Array, Int32Array
from bus.protocol.messages import (
    ControlUpdate,
    Fault,
    Feedback,
    FinishReason,
    Message,
    Outcome,
    SessionReady,
    TokenFeatures,
)
from decoding.pacing import Measures
from decoding.token_scores import TokenScore

# --- events -----------------------------------------------------------------------------------


class Started(Struct, frozen=True):
    """A peer is chosen, with the target's end tokens; open the session there.

    Attributes:
        measures: what earlier sessions have learnt about that peer, or None.
    """

    eos: frozenset[int]
    now_ms: float
    measures: Measures | None = None


class Opened(Struct, frozen=True):
    """`SessionReady` arrived."""

    message: SessionReady
    now_ms: float


class Drafted(Struct, frozen=True):
    """The draft thread delivers n ≥ 0 tokens (fewer than asked after an EOS or an interrupt).

    Attributes:
        job: of the `Draft` this answers; an answer to an older one is ignored.
        start: absolute position of the first token.
        num_cached: length of the draft's cache now, at most start + n − 1 with n > 0.
        q_ids: int32[n, K]. q_probs: float16[n, K], as they will be sent.
    """

    job: int
    start: int
    num_cached: int
    tokens: tuple[int, ...]
    q_ids: Int32Array
    q_probs: Float16Array
    draft_ms: float
    now_ms: float


class FeedbackArrived(Struct, frozen=True):
    message: Feedback
    now_ms: float


class ControlArrived(Struct, frozen=True):
    message: ControlUpdate
    now_ms: float


class FaultArrived(Struct, frozen=True):
    message: Fault
    now_ms: float


class Tick(Struct, frozen=True):
    """Time passes; ask for what is overdue."""

    now_ms: float


class PeerLost(Struct, frozen=True):
    """The cloud worker is gone from the registry, or another process has taken its name."""

    now_ms: float


class StopMatched(Struct, frozen=True):
    """A stop string was completed by generated token number `num_generated` (counted from 1)."""

    num_generated: int


class Rebased(Struct, frozen=True):
    """The text is another: `tokens`, prompt included. For a session whose text is another one's
    drafts (`decoding.cascade`); it may have ended before."""

    tokens: tuple[int, ...]
    now_ms: float


class Read(Struct, frozen=True):
    """The reader of such a session's text has come to absolute position `length`."""

    length: int
    now_ms: float


class Ended(Struct, frozen=True):
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
    | Rebased
    | Read
    | Ended
)

# --- effects ----------------------------------------------------------------------------------


class Draft(Struct, frozen=True):
    """Run `feed` (never empty), then draft `count` tokens."""

    job: int
    feed: tuple[int, ...]
    count: int


class Crop(Struct, frozen=True):
    """Cut the draft's cache to `length` tokens."""

    length: int


class Learn(Struct, frozen=True):
    """Give the draft the target's features of the positions from `start` on, before its next
    `Draft`; of positions and tokens that are final (`decoding.token_features`)."""

    start: int
    features: TokenFeatures


class Send(Struct, frozen=True):
    """Send to the session's cloud worker."""

    message: Message


class Commit(Struct, frozen=True):
    """Promise `tokens` to the user; the first is generated token number `start` (from 0).

    `accepted[i]`: whether token i had been drafted by then, or proposed by the target's
    speculator (else it is the target's own). `scores[i]` are its log-probabilities, where they are
    wanted; `prompt_scores`, with the first tokens, those of the prompt from its second token on.
    """

    start: int
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore, ...] = ()


class WindowJudged(Struct, frozen=True):
    """What one feedback says of one window, for telemetry; of outcome `own` and without a window
    where it commits none that was sent.

    Attributes:
        number: of the window, 0 without one.
        num_accepted: its leading tokens that are accepted; num_committed: tokens that this feedback
            commits because of it, the target's own included.
        length: of the text afterwards, prompt included.
        verify_ms, queue_ms: of the pass; pass_tokens: the same in the first of a feedback, else 0.
        budget: tokens allowed in flight until this feedback; `in_flight`: how many there were.
        rtt_ms: the last round trip measured. at_ms: when the feedback came.
        rescued: the text has turned to a branch that had been drafted (`decoding.rescue`).
        proposed: tokens of the tree that the pass has judged; then `num_drafted` is its depth, and
            the number is 0.
    """

    incarnation: int
    number: int
    outcome: Outcome
    num_drafted: int
    num_accepted: int
    num_committed: int
    rolled_back: bool
    length: int
    threshold: float
    window: int
    credit: float
    budget: int
    in_flight: int
    draft_ms: float
    verify_ms: float
    queue_ms: float
    pass_tokens: int
    rtt_ms: float
    at_ms: float
    rescued: bool = False
    proposed: int = 0


class CheckPeer(Struct, frozen=True):
    """The peer has not answered for a while: look it up; answer `PeerLost` if it is gone."""


class SeekPeer(Struct, frozen=True):
    """Find a cloud worker and answer `Started`.

    Attributes:
        pause_ms: before a worker that is full, or the one that the session comes from, is asked
            again. One with room is asked at once.
        leave: the worker that the session comes from is the last choice.
    """

    why: str
    pause_ms: float = 0.0
    leave: bool = True


class Finish(Struct, frozen=True):
    """The session is over; nothing follows. The cache may be freed."""

    reason: FinishReason
    error: str = ""


Effect = Draft | Crop | Learn | Send | Commit | WindowJudged | CheckPeer | SeekPeer | Finish
