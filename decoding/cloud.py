"""One session at the cloud, as a pure state machine: `step(state, event) → (state, effects)`.

    stage       event                    next        effects
    ----------  -----------------------  ----------  -----------------------------------------
    (open)                               PREFILLING  Send SessionReady, Report, Prefill
    PREFILLING  Prefilled                IDLE        then the window that waits, if any
    IDLE        WindowArrived, expected  VERIFYING   Forward, over all windows that wait in order
    VERIFYING   WindowArrived, the next  same        held; joins the pass if it has not begun
                RowsReady                IDLE        for each window: Send Feedback, ReportWindow
                … rejected               IDLE        the same and Crop; later windows are stale
                … rejected, residual     RECOVERING  FetchRow
                PrehitFailed             IDLE        Send Feedback(prehit_rejected), ReportWindow
                … residual               RECOVERING  FetchRow
    RECOVERING  FullRowReady             IDLE        Crop, Send Feedback, ReportWindow
    any         WindowArrived, repeated  same        Send the feedback it had; compute nothing
                … after a gap, or busy   same        held
                … of an older epoch      same        Send the rejecting feedback again
                … of another incarnation same        Send Feedback(unknown_session), or nothing
    any         OpenArrived, same        same        Send SessionReady
                … lower incarnation      same        nothing; `check_reopen` says so to its sender
                … higher incarnation     PREFILLING  Crop to the common prefix, Prefill

Invariant between passes: either all of `tokens` has run and the last pass's last row, the kept
one, is the next token's distribution; or all but the last token has, and the next pass begins
with it. How fast windows come is the edge's business: the cloud runs the same whatever the pace
(`decoding.cloud_passes`).

This module knows no clock, no socket and no model.
"""

from __future__ import annotations

from msgspec.structs import replace

from bus.protocol.arrays import unpack_tokens
from bus.protocol.errors import ImpossibleEventError
from bus.protocol.messages import (
    DraftWindow,
    Fault,
    FaultCode,
    Feedback,
    OpenSession,
    Outcome,
    SessionOpened,
    SessionReady,
)
from decoding.cloud_events import (
    Crop,
    Event,
    FullRowReady,
    OpenArrived,
    Prefill,
    Prefilled,
    PrehitFailed,
    Report,
    RowsReady,
    Send,
    WindowArrived,
)
from decoding.cloud_passes import extended, judge, next_pass, prehit_failed, recovered
from decoding.cloud_state import (
    MAX_HELD,
    MAX_KEPT_FEEDBACKS,
    CloudState,
    Limits,
    Stage,
    Step,
    refusal,
)
from decoding.methods import Method
from decoding.sampling import SamplingParams
from decoding.verification import Arrived

__all__ = [
    "MAX_HELD",
    "MAX_KEPT_FEEDBACKS",
    "CloudState",
    "Limits",
    "Stage",
    "Step",
    "begin",
    "check_open",
    "check_reopen",
    "extended",
    "step",
    "unknown_session",
]


def begin(message: OpenSession, method: Method, cloud: str, limits: Limits) -> Step:
    """A session that is not known here yet. The message has passed `check_open`."""
    state = CloudState(
        cloud=cloud,
        session=message.session,
        client=message.client,
        edge=message.edge,
        method=method,
        sampling=SamplingParams(
            message.temperature, message.top_p, message.top_k, message.seed, message.coupling
        ),
        limits=limits,
        incarnation=message.incarnation,
        epoch=message.epoch,
        next_seq=message.next_seq,
        tokens=unpack_tokens(message.prompt) + unpack_tokens(message.committed),
    )
    return _prefill(state)


def check_open(message: OpenSession, digest: str, limits: Limits) -> Fault | None:
    """Why a session cannot be opened here, or None."""
    tokens = unpack_tokens(message.prompt) + unpack_tokens(message.committed)
    if message.tokenizer_digest != digest:
        return refusal(
            message.session,
            FaultCode.TOKENIZER_MISMATCH,
            "draft and target do not share a tokenizer; use a draft of the target's family",
        )
    if not all(0 <= token < limits.vocab_size for token in tokens):
        return refusal(
            message.session,
            FaultCode.BAD_TOKENS,
            f"token ids must lie in 0 … {limits.vocab_size - 1}",
        )
    length = len(unpack_tokens(message.prompt)) + message.max_new_tokens
    if length > limits.context_length:
        return refusal(
            message.session,
            FaultCode.CONTEXT_OVERFLOW,
            f"prompt and max_new_tokens take {length} tokens, the target's context holds "
            f"{limits.context_length}",
        )
    return None


def check_reopen(state: CloudState, message: OpenSession) -> Fault | None:
    """Why an open session cannot be opened again so, or None; for the sender, who may not be the
    session's edge any more."""
    if message.incarnation >= state.incarnation:
        return None
    return refusal(
        message.session,
        FaultCode.STALE_INCARNATION,
        f"incarnation {message.incarnation} is older than {state.incarnation}, which runs here: "
        "another edge worker has taken the request over",
    )


def step(state: CloudState, event: Event) -> Step:
    """Advance one session by one event.

    Raises:
        ImpossibleEventError: work is complete that was never asked for, or of another kind.
    """
    match event:
        case OpenArrived(message):
            return _open_again(state, message)
        case WindowArrived(message, now_ms):
            return _window(state, Arrived(message, now_ms))
    if event.job < state.job:  # opened again meanwhile
        return state, ()
    match event, state.stage:
        case Prefilled(job=state.job), Stage.PREFILLING:
            return next_pass(replace(state, stage=Stage.IDLE))
        case RowsReady(job=state.job), Stage.VERIFYING:
            return judge(state, event)
        case PrehitFailed(job=state.job), Stage.VERIFYING:
            return prehit_failed(state, event.row, event.now_ms)
        case FullRowReady(job=state.job), Stage.RECOVERING:
            return recovered(state, event.probs)
    raise ImpossibleEventError(
        f"{type(event).__name__} of job {event.job} in stage {state.stage.value}; job {state.job} "
        "is the newest"
    )


# --- opening ----------------------------------------------------------------------------------


def _ready(state: CloudState) -> Send:
    return Send(SessionReady(state.session, state.incarnation, state.cloud))


def _prefill(state: CloudState) -> Step:
    """Run what the cache lacks, all but the last token: that one yields the first window's row."""
    job = state.job + 1
    missing = state.tokens[state.num_run : -1]
    state = replace(
        state, job=job, stage=Stage.PREFILLING, num_run=max(state.num_run, len(state.tokens) - 1)
    )
    opened = SessionOpened(
        session=state.session,
        client=state.client,
        edge=state.edge,
        cloud=state.cloud,
        method=state.method.name,
        incarnation=state.incarnation,
    )
    return state, (_ready(state), Report(opened), Prefill(job, missing))


def _open_again(state: CloudState, message: OpenSession) -> Step:
    if message.incarnation < state.incarnation:
        return state, ()
    if message.incarnation == state.incarnation:
        return state, (_ready(state),)
    tokens = unpack_tokens(message.prompt) + unpack_tokens(message.committed)
    common = _common_prefix(state.tokens, tokens)
    num_run = min(state.num_run, common, len(tokens) - 1)
    state = replace(
        state,
        edge=message.edge,
        incarnation=message.incarnation,
        epoch=message.epoch,
        next_seq=message.next_seq,
        tokens=tokens,
        num_run=num_run,
        verifications=(),
        kept=None,
        held=(),
        feedbacks=(),
    )
    state, effects = _prefill(state)
    return state, (Crop(num_run), *effects)


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


# --- windows ----------------------------------------------------------------------------------


def _window(state: CloudState, arrived: Arrived) -> Step:
    message = arrived.message
    if message.incarnation != state.incarnation:
        if message.incarnation < state.incarnation:
            return state, ()
        return state, (Send(unknown_session(message)),)
    if message.epoch < state.epoch:
        return state, (Send(_rejection_of(state, message)),)
    if message.seq < state.next_seq:
        return state, tuple(Send(f) for f in state.feedbacks if f.seq == message.seq)
    if any(v.arrived.message.seq == message.seq for v in state.verifications):
        return state, ()
    is_due = message.seq == state.next_seq  # never shut out by those that came too early
    if all(h.message.seq != message.seq for h in state.held) and (
        is_due or len(state.held) < MAX_HELD
    ):
        state = replace(state, held=(*state.held, arrived))
    return next_pass(state)


def unknown_session(message: DraftWindow) -> Feedback:
    """The answer to a window of a session this worker does not know; the edge opens it again."""
    return _plain_feedback(message, Outcome.UNKNOWN_SESSION, committed_length=0)


def _plain_feedback(message: DraftWindow, outcome: Outcome, committed_length: int) -> Feedback:
    return Feedback(
        session=message.session,
        incarnation=message.incarnation,
        epoch=message.epoch,
        seq=message.seq,
        committed_length=committed_length,
        outcome=outcome,
        num_accepted=0,
        next_token=None,
        threshold=message.threshold,
        verify_ms=0.0,
        queue_ms=0.0,
        pass_tokens=0,
    )


def _rejection_of(state: CloudState, message: DraftWindow) -> Feedback:
    """The feedback that ended the window's epoch; a bare `stale` where it is no longer kept."""
    for feedback in reversed(state.feedbacks):
        if feedback.epoch == message.epoch and feedback.outcome is not Outcome.ACCEPTED:
            return feedback
    return _plain_feedback(message, Outcome.STALE, len(state.tokens))
