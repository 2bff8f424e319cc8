"""What a session at the edge sends, derived from its state."""

from __future__ import annotations

from msgspec.structs import replace

from bus.protocol.arrays import pack_tokens
from bus.protocol.messages import Ack, DraftRows, DraftWindow, OpenSession
from decoding.edge_events import Drafted, Effect, Send
from decoding.edge_state import EdgeState, InFlight, Running

MAX_SENT = 64
"""Messages whose sending is remembered, to measure round trips by."""


def opening(state: EdgeState) -> OpenSession:
    """Begin or take up the session at a cloud worker."""
    spec = state.spec
    return OpenSession(
        session=spec.session,
        client=spec.client,
        edge=spec.edge,
        incarnation=state.incarnation,
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
        rows=spec.rows,
        features=spec.reads_features,
        logprobs=spec.logprobs,
        prompt_logprobs=spec.prompt_logprobs and not state.num_generated,
        traceparent=spec.traceparent,
        ignore_eos=spec.ignore_eos,
    )


def _drafted_rows(state: EdgeState, event: Drafted, first: int) -> DraftRows | None:
    """What the tokens from index `first` on were drawn from, where the method needs it."""
    if not state.spec.method.needs_rows(state.spec.sampling):
        return None
    return DraftRows(
        q_ids=event.q_ids[first:].astype("<i4", copy=False).tobytes(),
        q_probs=event.q_probs[first:].astype("<f2", copy=False).tobytes(),
        threshold=state.threshold_at(event.now_ms),
        control_version=state.control.version,
        edge_ms=state.previous.edge_ms,
        rework_ms=state.previous.rework_ms,
    )


def new_window(
    state: EdgeState, event: Drafted, start: int, tokens: tuple[int, ...], follows: bytes,
    branch: bool = False,
) -> InFlight:  # fmt: skip
    """The next window, not sent yet: tokens of a draft job, from position `start` on."""
    return InFlight(
        number=state.last_number + 1,
        start=start,
        tokens=tokens,
        follows=follows,
        rows=_drafted_rows(state, event, start - event.start),
        threshold=state.threshold_at(event.now_ms),
        draft_ms=event.draft_ms,
        drafted_ms=event.now_ms - event.draft_ms,
        num_sends=0,
        branch=branch,
    )


def sent_windows(
    state: EdgeState, windows: tuple[InFlight, ...], now_ms: float
) -> tuple[EdgeState, tuple[Effect, ...]]:
    """Send windows, once more maybe; each acknowledges the text that has come."""
    stage = state.stage
    if not isinstance(stage, Running) or not windows:
        return state, ()
    waits_ms = stage.waits_ms
    if not state.spec.method.runs_on and all(not flight.num_sends for flight in state.in_flight):
        waits_ms = now_ms  # nothing was waited for
    numbers = {flight.number for flight in windows}

    def counted(flights: tuple[InFlight, ...]) -> tuple[InFlight, ...]:
        return tuple(
            replace(f, num_sends=f.num_sends + 1) if f.number in numbers else f for f in flights
        )

    sends = tuple(
        Send(
            DraftWindow(
                handle=stage.handle,
                number=flight.number,
                acknowledged=state.acknowledged,
                start=flight.start,
                follows=flight.follows,
                tokens=pack_tokens(flight.tokens),
                rows=flight.rows,
                branch=flight.branch,
            )
        )
        for flight in windows
    )
    once = tuple((flight.number, now_ms) for flight in windows if not flight.num_sends)
    others = tuple(known for known in state.sent if known[0] not in numbers)
    state = replace(
        state,
        in_flight=counted(state.in_flight),
        branches=tuple(replace(b, windows=counted(b.windows)) for b in state.branches),
        sent=(*others, *once)[-MAX_SENT:],
        stage=replace(stage, acked_ms=now_ms, waits_ms=waits_ms),
    )
    return state, sends


def acknowledged(
    state: EdgeState, now_ms: float, again: bool
) -> tuple[EdgeState, tuple[Effect, ...]]:
    """Say which text has come, and the threshold where no window carries it; with `again`, ask for
    what lies beyond that text."""
    stage = state.stage
    assert isinstance(stage, Running)
    number = state.last_number + 1
    threshold = state.threshold_at(now_ms) if state.spec.method.sends_threshold else None
    message = Ack(stage.handle, number, state.acknowledged, again, threshold)
    state = replace(
        state,
        last_number=number,
        sent=(*state.sent, (number, now_ms))[-MAX_SENT:],
        stage=replace(stage, acked_ms=now_ms),
    )
    return state, (Send(message),)
