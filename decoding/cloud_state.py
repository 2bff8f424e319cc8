"""The state of one session at the cloud, as frozen data; `decoding.cloud` moves it."""

from __future__ import annotations

from enum import Enum

from msgspec import Struct

from bus.protocol.messages import Fault, FaultCode, Feedback
from decoding.cloud_events import Effect
from decoding.methods import Method
from decoding.sampling import SamplingParams
from decoding.verification import Arrived, Verification

MAX_PASS_TOKENS = 256
"""Drafted tokens of one pass over several windows; others' passes come between [ours]."""
MAX_HELD = 64
"""Windows a session may hold after a gap, besides the one that is due [ours]."""
MAX_KEPT_FEEDBACKS = 64
"""Feedbacks kept for repeated windows; more are never in flight [ours]."""

Step = tuple["CloudState", tuple[Effect, ...]]


class Stage(Enum):
    PREFILLING = "prefilling"
    IDLE = "idle"
    VERIFYING = "verifying"
    RECOVERING = "recovering"


class Limits(Struct, frozen=True):
    """What this worker's model and operator allow.

    Attributes:
        vocab_size: real tokens, shared by draft and target.
        threshold_min, threshold_max: bounds a window's threshold is clipped to.
    """

    vocab_size: int
    context_length: int
    threshold_min: float
    threshold_max: float


class CloudState(Struct, frozen=True):
    """One session at the cloud.

    Attributes:
        tokens: prompt and verified tokens.
        num_run: how many of them the target's cache holds once the effects so far have run.
        verifications: the windows under judgement, in order; more may have joined their pass.
        held: windows that came early, by arrival.
        feedbacks: the latest feedback of this incarnation, oldest first.
        job: number of the newest model job; answers to older ones are ignored.
        kept: index among the last pass's rows of the one after `tokens`, where it was run: the
            distribution of the next token, which pre-hit judges by.
    """

    cloud: str
    session: str
    client: str
    edge: str
    method: Method
    sampling: SamplingParams
    limits: Limits
    incarnation: int
    epoch: int
    next_seq: int
    tokens: tuple[int, ...]
    num_run: int = 0
    stage: Stage = Stage.PREFILLING
    verifications: tuple[Verification, ...] = ()
    held: tuple[Arrived, ...] = ()
    feedbacks: tuple[Feedback, ...] = ()
    job: int = 0
    kept: int | None = None


def refusal(session: str, code: FaultCode, detail: str) -> Fault:
    """A `Fault` about a session."""
    return Fault(session=session, code=code, detail=detail)
