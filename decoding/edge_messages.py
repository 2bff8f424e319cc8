"""What a session at the edge sends, derived from its state; and which feedback can answer it."""

from __future__ import annotations

from bus.protocol.arrays import pack_tokens
from bus.protocol.messages import DraftWindow, Feedback, OpenSession, Outcome
from decoding.edge_events import Drafted
from decoding.edge_state import EdgeState

__all__ = ["fits", "opening", "window"]


def opening(state: EdgeState) -> OpenSession:
    """Begin or take up the session at a cloud worker, with what is in flight still to come."""
    spec = state.spec
    return OpenSession(
        session=spec.session,
        client=spec.client,
        edge=spec.edge,
        incarnation=state.incarnation,
        epoch=state.epoch,
        next_seq=state.in_flight[0].message.seq if state.in_flight else state.next_seq,
        method=spec.method.name,
        prompt=pack_tokens(spec.prompt),
        committed=pack_tokens(state.tokens[len(spec.prompt) :]),
        seed=spec.sampling.seed,
        max_new_tokens=spec.max_new_tokens,
        temperature=spec.sampling.temperature,
        top_p=spec.sampling.top_p,
        top_k=spec.sampling.top_k,
        coupling=spec.sampling.coupling,
        tokenizer_digest=spec.tokenizer_digest,
    )


def window(state: EdgeState, event: Drafted) -> DraftWindow:
    """What has just been drafted."""
    with_rows = state.spec.method.needs_rows(state.spec.sampling)
    return DraftWindow(
        session=state.spec.session,
        incarnation=state.incarnation,
        epoch=state.epoch,
        seq=state.next_seq,
        start=event.start,
        tokens=pack_tokens(event.tokens),
        q_ids=event.q_ids.astype("<i4", copy=False).tobytes() if with_rows else b"",
        q_probs=event.q_probs.astype("<f2", copy=False).tobytes() if with_rows else b"",
        threshold=state.threshold_at(event.now_ms),
        control_version=state.control.version,
        draft_ms=event.draft_ms,
        edge_ms=state.previous.edge_ms,
        rework_ms=state.previous.rework_ms,
        rtt_ms=state.previous.rtt_ms,
        awaits=state.job_awaits,
    )


def fits(feedback: Feedback, window: DraftWindow, verified: int) -> bool:
    """Whether feedback can belong to `window`, after which `verified` tokens are verified."""
    given = 0 if feedback.next_token is None else 1
    if feedback.outcome is Outcome.ACCEPTED:
        counted = feedback.num_accepted == window.num_tokens
    else:
        counted = feedback.num_accepted < window.num_tokens and given == 1
    return counted and feedback.committed_length == verified + given
