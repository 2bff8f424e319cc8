"""One session at the cloud, as a pure state machine: `step(state, event) → (state, effects)`.

    stage       event                    next        effects
    ----------  -----------------------  ----------  -----------------------------------------
    (open)                               PREFILLING  Send SessionReady, Report, Prefill
    PREFILLING  Prefilled                IDLE        then the window that waits, if any
    IDLE        WindowArrived, expected  VERIFYING   Forward
    VERIFYING   RowsReady                IDLE        Crop, Send Feedback, ReportWindow
                … rejected, sampled      RECOVERING  FetchRow
    RECOVERING  FullRowReady             IDLE        Crop, Send Feedback, ReportWindow
    any         WindowArrived, repeated  same        Send the feedback it had; compute nothing
                … behind a gap, or busy  same        held
                … of an older epoch      same        Send the rejecting feedback again
                … of another incarnation same        Send Feedback(unknown_session), or nothing
    any         OpenArrived, same        same        Send SessionReady
                … higher incarnation     PREFILLING  Crop to the common prefix, Prefill

Invariant: `num_run` ≤ len(tokens) − 1 between windows, so the next pass always runs the last
verified token and yields the row that judges the window's first. The pass runs the whole window
where the pace commits a bonus token, and all but its last token where it does not.

This module knows no clock, no socket and no model.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from bus.arrays import Int32Array, unpack_tokens
from bus.messages import (
    DraftWindow,
    Fault,
    FaultCode,
    Feedback,
    OpenSession,
    Outcome,
    SessionOpened,
    SessionReady,
)
from decoding.acceptance import TargetRow
from decoding.cloud_events import (
    Crop,
    Effect,
    Event,
    FetchRow,
    Forward,
    FullRowReady,
    OpenArrived,
    Prefill,
    Prefilled,
    Report,
    ReportWindow,
    RowsReady,
    Send,
    WindowArrived,
)
from decoding.methods import Method
from decoding.methods.base import Proposal
from decoding.sampling import SamplingParams
from decoding.verification import Arrived, Verification

MAX_HELD = 64
"""Windows a session may hold behind a gap, besides the one that is due [ours]."""
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
        vocab_size: real tokens, shared by draft and target (DESIGN rule 8).
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
        held: windows that came early, by arrival.
        feedbacks: the latest verdicts of this incarnation, oldest first.
        job: number of the newest model job; answers to older ones are ignored.
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
    verification: Verification | None = None
    held: tuple[Arrived, ...] = ()
    feedbacks: tuple[Feedback, ...] = ()
    job: int = 0


def begin(message: OpenSession, method: Method, cloud: str, limits: Limits) -> Step:
    """A session that is not known here yet. The message has passed `check_open`."""
    state = CloudState(
        cloud=cloud,
        session=message.session,
        client=message.client,
        edge=message.edge,
        method=method,
        sampling=SamplingParams(message.temperature, message.top_p, message.top_k, message.seed),
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
        return _fault(
            message.session,
            FaultCode.TOKENIZER_MISMATCH,
            "draft and target do not share a tokenizer; use a draft of the target's family",
        )
    if not all(0 <= token < limits.vocab_size for token in tokens):
        return _fault(
            message.session,
            FaultCode.BAD_TOKENS,
            f"token ids must lie in 0 … {limits.vocab_size - 1}",
        )
    length = len(unpack_tokens(message.prompt)) + message.max_new_tokens
    if length > limits.context_length:
        return _fault(
            message.session,
            FaultCode.CONTEXT_OVERFLOW,
            f"prompt and max_new_tokens take {length} tokens, the target's context holds "
            f"{limits.context_length}",
        )
    return None


def step(state: CloudState, event: Event) -> Step:
    """Advance one session by one event."""
    match event:
        case OpenArrived(message):
            return _open_again(state, message)
        case WindowArrived(message, now_ms):
            return _window(state, Arrived(message, now_ms))
        case Prefilled(job, _) if job == state.job:
            return _next_window(replace(state, stage=Stage.IDLE))
        case RowsReady(job, rows, verify_ms, now_ms) if job == state.job:
            return _judge(state, rows, verify_ms, now_ms)
        case FullRowReady(job, probs, _) if job == state.job:
            verification = _current(state)
            index = verification.rejected_at
            assert index is not None
            token = state.method.acceptance.recover(
                verification.proposals[index], probs, state.sampling, len(state.tokens) + index
            )
            return _conclude(state, verification, token)
        case _:
            return state, ()


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
        verification=None,
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
    verification = state.verification
    if verification is not None and verification.arrived.message.seq == message.seq:
        return state, ()
    is_due = message.seq == state.next_seq  # never shut out by those that came too early
    if all(h.message.seq != message.seq for h in state.held) and (
        is_due or len(state.held) < MAX_HELD
    ):
        state = replace(state, held=(*state.held, arrived))
    return _next_window(state)


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
    )


def _rejection_of(state: CloudState, message: DraftWindow) -> Feedback:
    """The feedback that ended the window's epoch; a bare `stale` where it is no longer kept."""
    for feedback in reversed(state.feedbacks):
        if feedback.epoch == message.epoch and feedback.outcome is not Outcome.ACCEPTED:
            return feedback
    return _plain_feedback(message, Outcome.STALE, len(state.tokens))


def _next_window(state: CloudState) -> Step:
    """Begin with the expected window, if it waits and nothing runs."""
    if state.stage is not Stage.IDLE:
        return state, ()
    due = next((h for h in state.held if h.message.seq == state.next_seq), None)
    if due is None:
        return state, ()
    state = replace(state, held=tuple(h for h in state.held if h is not due))
    fault = _check_window(state, due.message)
    if fault is not None:
        return state, (Send(fault),)
    return _verify(state, due)


def _check_window(state: CloudState, message: DraftWindow) -> Fault | None:
    if message.epoch != state.epoch or message.start != len(state.tokens):
        return _fault(
            state.session,
            FaultCode.OUT_OF_ORDER,
            f"window {message.seq} of epoch {message.epoch} starts at {message.start}; expected "
            f"epoch {state.epoch} and position {len(state.tokens)}",
        )
    if message.start + message.num_tokens > state.limits.context_length:
        return _fault(
            state.session, FaultCode.CONTEXT_OVERFLOW, "the window ends beyond the context"
        )
    ids = message.q_id_rows.view(np.uint32)  # negative ids lie above
    if ids.max() >= state.limits.vocab_size:
        return _fault(
            state.session,
            FaultCode.BAD_TOKENS,
            f"q_ids must lie in 0 … {state.limits.vocab_size - 1}",
        )
    return None


def _verify(state: CloudState, arrived: Arrived) -> Step:
    message = arrived.message
    proposals = tuple(
        Proposal(token, ids, probs, state.sampling)
        for token, ids, probs in zip(
            message.token_ids, message.q_id_rows, message.q_prob_rows, strict=True
        )
    )
    if not all(proposal.possible for proposal in proposals):
        fault = _fault(
            state.session, FaultCode.BAD_TOKENS, "a token that its own distribution rules out"
        )
        return state, (Send(fault),)
    tokens = message.token_ids
    row_ids: tuple[Int32Array, ...] = tuple(message.q_id_rows)
    if state.method.pace.commits_bonus(state.sampling.greedy):
        row_ids += (row_ids[-1][:0],)
    else:
        tokens = tokens[:-1]
    feed = state.tokens[state.num_run :] + tokens
    state = replace(
        state,
        job=state.job + 1,
        stage=Stage.VERIFYING,
        num_run=state.num_run + len(feed),
        verification=Verification(arrived, proposals),
    )
    return state, (Forward(state.job, feed, row_ids),)


def _current(state: CloudState) -> Verification:
    assert state.verification is not None
    return state.verification


def _judge(state: CloudState, rows: tuple[TargetRow, ...], verify_ms: float, now_ms: float) -> Step:
    """Accept the longest prefix the rule accepts; decide what follows it."""
    verification = replace(_current(state), rows=rows, verify_ms=verify_ms, done_ms=now_ms)
    threshold = _clipped(state, verification.arrived.message.threshold)
    rule, start = state.method.acceptance, len(state.tokens)
    rejected_at = next(
        (
            i
            for i, (proposal, row) in enumerate(zip(verification.proposals, rows, strict=False))
            if not rule.accepts(proposal, row, state.sampling, start + i, threshold)
        ),
        None,
    )
    verification = replace(verification, rejected_at=rejected_at)
    if rejected_at is None:
        bonus = len(rows) > len(verification.proposals)
        return _conclude(state, verification, rows[-1].argmax if bonus else None)
    if state.sampling.greedy:
        return _conclude(state, verification, rows[rejected_at].argmax)
    state = replace(state, stage=Stage.RECOVERING, verification=verification)
    return state, (FetchRow(state.job, rejected_at),)


def _clipped(state: CloudState, threshold: float) -> float:
    return min(max(threshold, state.limits.threshold_min), state.limits.threshold_max)


def _conclude(state: CloudState, verification: Verification, next_token: int | None) -> Step:
    """Commit, crop, answer, report; then begin with the next window."""
    arrived, rejected_at = verification.arrived, verification.rejected_at
    message = arrived.message
    num_accepted = message.num_tokens if rejected_at is None else rejected_at
    accepted = message.token_ids[:num_accepted]
    verified = len(state.tokens) + num_accepted
    tokens = state.tokens + accepted + (() if next_token is None else (next_token,))
    feedback = Feedback(
        session=state.session,
        incarnation=state.incarnation,
        epoch=state.epoch,
        seq=message.seq,
        committed_length=len(tokens),
        outcome=Outcome.ACCEPTED if rejected_at is None else Outcome.PARTIAL,
        num_accepted=num_accepted,
        next_token=next_token,
        threshold=_clipped(state, message.threshold),
        verify_ms=verification.verify_ms,
        queue_ms=verification.queue_ms,
    )
    effects: tuple[Effect, ...] = (Send(feedback), ReportWindow(verification, feedback))
    num_run = min(state.num_run, verified)
    if num_run < state.num_run:
        effects = (Crop(num_run), *effects)
    state = replace(
        state,
        tokens=tokens,
        num_run=num_run,
        stage=Stage.IDLE,
        verification=None,
        next_seq=message.seq + 1,
        epoch=state.epoch if rejected_at is None else state.epoch + 1,
        held=state.held if rejected_at is None else (),
        feedbacks=(*state.feedbacks, feedback)[-MAX_KEPT_FEEDBACKS:],
    )
    state, more = _next_window(state)
    return state, effects + more


def _fault(session: str, code: FaultCode, detail: str) -> Fault:
    return Fault(session=session, code=code, detail=detail)
