"""Passes of one session at the cloud: which windows they hold, and what their rows decide.

Windows that wait together are verified in one pass, each with a feedback of its own, computed in
order; the first rejection makes the later ones stale. A pass over windows that nobody awaits runs
all their tokens and keeps the last row: the next window's first token is judged by it, and only
if it passes is anything run (docs/invariants.md, Pre-hit is free).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from msgspec.structs import replace

from bus.protocol.arrays import TOKEN_DTYPE, Float64Array, Int32Array
from bus.protocol.messages import Fault, FaultCode, Feedback, Outcome
from decoding.cloud_events import (
    Crop,
    Effect,
    FetchRow,
    Forward,
    ReportWindow,
    RowsReady,
    Send,
)
from decoding.cloud_state import (
    MAX_KEPT_FEEDBACKS,
    MAX_PASS_TOKENS,
    CloudState,
    Stage,
    Step,
    refusal,
)
from decoding.engine import NO_IDS, TargetRow
from decoding.methods.base import Proposal
from decoding.verification import Arrived, PreHit, Verification


def next_pass(state: CloudState) -> Step:
    """Begin with the expected window and those right behind it, if it waits and nothing runs."""
    if state.stage is not Stage.IDLE:
        return state, ()
    due = _held(state, state.next_seq)
    if due is None:
        return state, ()
    first = _proposed(state, due)
    fault = _check(state, first, len(state.tokens))
    if fault is not None:
        return replace(state, held=tuple(h for h in state.held if h is not due)), (Send(fault),)
    windows = _joined(state, (first,))
    prehit = None
    if state.kept is not None:
        prehit = PreHit(
            index=state.kept,
            rule=state.method.acceptance,
            proposal=first.proposals[0],
            sampling=state.sampling,
            position=len(state.tokens),
            threshold=clipped(state, due.message.threshold),
        )
    forward = _forward(state, windows, state.job + 1, prehit)
    taken = {window.arrived.message.seq for window in windows}
    state = replace(
        state,
        job=forward.job,
        stage=Stage.VERIFYING,
        num_run=state.num_run + len(forward.feed),
        verifications=windows,
        held=tuple(h for h in state.held if h.message.seq not in taken),
    )
    return state, (forward,)


def extended(state: CloudState, forward: Forward) -> Forward:
    """`forward` with the windows that have come since; the same where it is out of date.

    Pure, of a frozen state: the shell asks on the model thread, when the model is free.
    """
    if state.job != forward.job or state.stage is not Stage.VERIFYING:
        return forward
    windows = _joined(state, state.verifications)
    if len(windows) == len(state.verifications):
        return forward
    before = replace(state, num_run=state.num_run - len(forward.feed))
    return _forward(before, windows, forward.job, forward.prehit)


def _held(state: CloudState, seq: int) -> Arrived | None:
    return next((h for h in state.held if h.message.seq == seq), None)


def _proposed(state: CloudState, arrived: Arrived) -> Verification:
    message = arrived.message
    ids, probs = message.q_id_rows, message.q_prob_rows
    if not state.method.needs_rows(state.sampling):
        ids, probs = ids[:, :0], probs[:, :0]  # nobody looks at them
    rows = zip(message.token_ids, ids, probs, strict=True)
    return Verification(
        arrived,
        tuple(Proposal(token, ids, probs, state.sampling) for token, ids, probs in rows),
    )


def _joined(state: CloudState, windows: tuple[Verification, ...]) -> tuple[Verification, ...]:
    """`windows` and those held right behind them that can go with them."""
    while True:
        last = windows[-1].arrived.message
        behind = _held(state, last.seq + 1)
        end = last.start + last.num_tokens
        if behind is None or last.awaits:
            return windows
        if end + behind.message.num_tokens - len(state.tokens) > MAX_PASS_TOKENS:
            return windows
        window = _proposed(state, behind)
        if _check(state, window, end) is not None:
            return windows
        windows += (window,)


def _check(state: CloudState, window: Verification, start: int) -> Fault | None:
    """Why a window that should start at `start` cannot be judged."""
    message = window.arrived.message
    if message.epoch != state.epoch or message.start != start:
        return refusal(
            state.session,
            FaultCode.OUT_OF_ORDER,
            f"window {message.seq} of epoch {message.epoch} starts at {message.start}; expected "
            f"epoch {state.epoch} and position {start}",
        )
    if message.start + message.num_tokens > state.limits.context_length:
        return refusal(
            state.session, FaultCode.CONTEXT_OVERFLOW, "the window ends beyond the context"
        )
    needs_rows = state.method.needs_rows(state.sampling)
    if needs_rows and not message.q_ids:
        return refusal(
            state.session, FaultCode.BAD_TOKENS,
            f"{state.method.name} needs the draft's probabilities of each token, with coupling "
            f"{state.sampling.coupling.value}; the window has none",
        )  # fmt: skip
    read = message.q_ids if needs_rows else message.tokens
    ids = np.frombuffer(read, dtype=TOKEN_DTYPE).view(np.uint32)  # negative ids lie above
    if ids.max() >= state.limits.vocab_size:
        return refusal(
            state.session,
            FaultCode.BAD_TOKENS,
            f"token ids must lie in 0 … {state.limits.vocab_size - 1}",
        )
    if not all(proposal.possible for proposal in window.proposals):
        return refusal(
            state.session, FaultCode.BAD_TOKENS, "a token that its own distribution rules out"
        )
    return None


def _forward(
    state: CloudState, windows: tuple[Verification, ...], job: int, prehit: PreHit | None
) -> Forward:
    """The pass over `windows`, with what the cache lacks before them.

    It ends with a row behind the last token, for a bonus or to be kept; with residual coupling not
    where the window is awaited above temperature 0, since such a pass need not run its last token.
    """
    feed = state.tokens[state.num_run :]
    row_ids: list[Int32Array] = []
    for window in windows:
        feed += window.arrived.message.token_ids
        row_ids.extend(proposal.ids for proposal in window.proposals)
    if prehit is not None:
        del row_ids[0]  # the kept row is its row
    awaited = windows[-1].arrived.message.awaits
    if awaited and not state.sampling.coupled and len(feed) > 1:
        feed = feed[:-1]
    else:
        row_ids.append(NO_IDS)
    choices_at: tuple[int | None, ...] = ()
    if state.sampling.choosing:
        first = len(state.tokens) + (prehit is not None)
        choices_at = tuple(range(first, first + len(row_ids)))
        if not awaited:  # a row to be kept is asked again
            choices_at = (*choices_at[:-1], None)
    return Forward(job, feed, tuple(row_ids), choices_at, len(windows), prehit)


def judge(state: CloudState, ready: RowsReady) -> Step:
    """Accept the longest prefix the rule accepts; decide what follows it."""
    windows, rows, num_windows = state.verifications, ready.rows, ready.num_windows
    if num_windows > len(windows):
        windows = _joined(state, windows)[:num_windows]
        taken = {window.arrived.message.seq for window in windows}
        state = replace(state, held=tuple(h for h in state.held if h.message.seq not in taken))
    kept_rows = 0 if state.kept is None else 1
    num_tokens = sum(len(window.proposals) for window in windows)
    behind = len(rows) > num_tokens
    num_run = len(state.tokens) + num_tokens - (not behind)
    pass_tokens = num_run - len(state.tokens) + (not kept_rows)
    state = replace(state, num_run=num_run, kept=len(rows) - 1 - kept_rows if behind else None)
    effects: tuple[Effect, ...] = ()
    offset = 0
    for window in windows:
        end = offset + len(window.proposals)
        seen = replace(
            window, rows=rows[offset : end + (window is windows[-1])], verify_ms=ready.verify_ms,
            done_ms=ready.now_ms, pass_tokens=0 if offset else pass_tokens, share=ready.share,
        )  # fmt: skip
        state, more = _judge_window(state, seen, offset - kept_rows)
        effects += more
        if state.stage is Stage.RECOVERING or state.epoch != window.arrived.message.epoch:
            break
        offset = end
    return _go_on(state, effects)


def prehit_failed(state: CloudState, row: TargetRow, now_ms: float) -> Step:
    """The kept row has rejected the first token: nothing was run."""
    window = replace(
        state.verifications[0], rows=(row,), done_ms=now_ms, rejected_at=0, prehit_failed=True
    )
    kept = state.kept
    assert kept is not None
    return _go_on(*_reject(replace(state, num_run=len(state.tokens)), window, kept))


def recovered(state: CloudState, probs: Float64Array) -> Step:
    """The row of the rejection has come: draw what stands in for the rejected token."""
    (window,) = state.verifications
    index = window.rejected_at
    assert index is not None
    token = state.method.acceptance.recover(
        window.proposals[index], probs, state.sampling, len(state.tokens) + index
    )
    return _go_on(*_conclude(state, window, token))


def _judge_window(state: CloudState, window: Verification, first_row: int) -> Step:
    """One window of a pass; `first_row` is the index of its first row in that pass."""
    threshold = clipped(state, window.arrived.message.threshold)
    rule, start = state.method.acceptance, len(state.tokens)
    for i, (proposal, row) in enumerate(zip(window.proposals, window.rows, strict=False)):
        if not rule.accepts(proposal, row, state.sampling, start + i, threshold):
            return _reject(state, replace(window, rejected_at=i), first_row + i)
    if window.arrived.message.awaits and len(window.rows) > len(window.proposals):
        return _conclude(state, window, _own_token(state, window.rows[-1]))
    return _conclude(state, window, None)


def _reject(state: CloudState, window: Verification, row_index: int) -> Step:
    """The target's own token follows; with residual coupling a draw from the full row."""
    if state.sampling.coupled:
        assert window.rejected_at is not None
        return _conclude(state, window, _own_token(state, window.rows[window.rejected_at]))
    state = replace(state, stage=Stage.RECOVERING, verifications=(window,))
    return state, (FetchRow(state.job, row_index),)


def _own_token(state: CloudState, row: TargetRow) -> int | None:
    """What the target itself writes here; None where the seed alone does not say."""
    if state.sampling.greedy:
        return row.argmax
    return None if row.choice is None else row.choice.token


def _conclude(state: CloudState, window: Verification, next_token: int | None) -> Step:
    """Commit, crop, answer, report."""
    message, rejected_at = window.arrived.message, window.rejected_at
    num_accepted = message.num_tokens if rejected_at is None else rejected_at
    verified = len(state.tokens) + num_accepted
    tokens = state.tokens + message.token_ids[:num_accepted]
    tokens += () if next_token is None else (next_token,)
    feedback = Feedback(
        session=state.session,
        incarnation=state.incarnation,
        epoch=state.epoch,
        seq=message.seq,
        committed_length=len(tokens),
        outcome=_outcome(window),
        num_accepted=num_accepted,
        next_token=next_token,
        threshold=clipped(state, message.threshold),
        verify_ms=window.verify_ms,
        queue_ms=window.queue_ms,
        pass_tokens=window.pass_tokens,
    )
    effects: tuple[Effect, ...] = (Send(feedback), ReportWindow(window, feedback))
    rolled_back = rejected_at is not None
    num_run = min(state.num_run, verified) if rolled_back else state.num_run
    if num_run < state.num_run:
        effects = (Crop(num_run), *effects)
    state = replace(
        state,
        tokens=tokens,
        num_run=num_run,
        kept=state.kept if next_token is None else None,
        verifications=(),
        next_seq=message.seq + 1,
        epoch=state.epoch + rolled_back,
        held=() if rolled_back else state.held,
        feedbacks=(*state.feedbacks, feedback)[-MAX_KEPT_FEEDBACKS:],
    )
    return state, effects


def _outcome(window: Verification) -> Outcome:
    if window.rejected_at is None:
        return Outcome.ACCEPTED
    return Outcome.PREHIT_REJECTED if window.prehit_failed else Outcome.PARTIAL


def _go_on(state: CloudState, effects: Iterable[Effect]) -> Step:
    """Idle again, unless a row is being fetched; then begin with what waits."""
    if state.verifications:
        return state, tuple(effects)
    state, more = next_pass(replace(state, stage=Stage.IDLE))
    return state, (*effects, *more)


def clipped(state: CloudState, threshold: float) -> float:
    """Within the operator's bounds."""
    return min(max(threshold, state.limits.threshold_min), state.limits.threshold_max)
