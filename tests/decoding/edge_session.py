"""One session of the edge's machine, for tests: an event in, the effects out."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from bus.protocol.arrays import Float16Array, Int32Array, pack_tokens
from bus.protocol.bounds import SessionCoupling
from bus.protocol.messages import (
    Ack,
    DraftRows,
    DraftWindow,
    Fault,
    FaultCode,
    Feedback,
    FinishReason,
    Outcome,
    SessionReady,
)
from decoding import edge, methods
from decoding.edge_events import (
    Drafted,
    Effect,
    Ended,
    Event,
    FaultArrived,
    FeedbackArrived,
    Opened,
    Send,
    Started,
    WindowJudged,
)
from decoding.methods.base import Flow, PaceView
from decoding.sampling import SamplingParams
from tests.sessions import OPENING, PROMPT, drafted_rows, drafted_window

__all__ = ["PROMPT"]

EOS = 99


class ThreeAhead:
    """Drafts on while up to three windows wait."""

    name, forecasts = "three-ahead", False

    def flow(self, view: PaceView) -> Flow:
        return Flow(message=view.window, budget=3 * view.window, awaits=False)


SPEC = edge.SessionSpec(
    session="s1",
    client="c1",
    edge="edge-1",
    method=methods.sd.METHOD,
    prompt=PROMPT,
    sampling=SamplingParams(),
    max_new_tokens=20,
    tokenizer_digest="digest",
)
RESIDUAL = replace(SPEC, sampling=SamplingParams(0.7, 0.9, 40, 5, SessionCoupling.RESIDUAL))
AHEAD = replace(SPEC, method=dataclasses.replace(methods.sd.METHOD, name="sd", pace=ThreeAhead()))
RUNS_ON = replace(AHEAD, method=dataclasses.replace(AHEAD.method, runs_on=True))
THIN = replace(RUNS_ON, drafts=False)
CONTROL = edge.Control(threshold=0.15, window=4, conservative_threshold=0.02)
OPEN = msgspec.structs.replace(OPENING, seed=0)
TOKENS = (10, 11, 12, 13)


def rows(tokens: tuple[int, ...]) -> tuple[Int32Array, Float16Array]:
    """What a draft with K = 2 would send for these tokens."""
    ids = np.array([[token, 0] for token in tokens], dtype=np.int32)
    return ids, np.tile(np.array([0.75, 0.25], dtype=np.float16), (len(tokens), 1))


def drafted(job: int, start: int, tokens: tuple[int, ...], now_ms: float = 10.0) -> Drafted:
    ids, probs = rows(tokens) if tokens else (np.empty((0, 2), np.int32), np.empty((0, 2), "<f2"))
    num_cached = start + max(len(tokens) - 1, 0)
    return Drafted(job, start, num_cached, tokens, ids, probs, draft_ms=6.0, now_ms=now_ms)


def sent(
    tokens: tuple[int, ...] = TOKENS, after: tuple[int, ...] = PROMPT,
    rows: DraftRows | None = None, **changes: Any,
) -> Send:  # fmt: skip
    """A window as it goes out; the first of the session."""
    return Send(drafted_window(after, tokens, rows=rows, **changes))


def sent_rows(tokens: tuple[int, ...], **changes: Any) -> DraftRows:
    return drafted_rows(tokens, **{"threshold": 0.02, "edge_ms": 0.0, "rework_ms": 0.0} | changes)


def ack(number: int, length: int, again: bool = False, handle: int = 1) -> Send:
    return Send(Ack(handle, number, length, again))


def feedback(start: int, tokens: tuple[int, ...], **changes: Any) -> Feedback:
    """After window 1, which was 11 ms at the cloud."""
    plain = Feedback(
        handle=1, start=start, tokens=pack_tokens(tokens), number=1, held_ms=11.0, verify_ms=10.0,
        queue_ms=1.0, pass_tokens=4,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def says(
    start: int, tokens: tuple[int, ...], now_ms: float = 30.0, **changes: Any
) -> FeedbackArrived:
    return FeedbackArrived(feedback(start, tokens, **changes), now_ms)


ALL_ACCEPTED = says(3, (10, 11, 12, 13, 50))
TWO_ACCEPTED = says(3, (10, 11, 60))


class Edge:
    """A session at the edge, told events one by one."""

    def __init__(self, spec: edge.SessionSpec = SPEC, **taken_over: Any) -> None:
        self.state, self.effects = edge.begin(spec, CONTROL, **taken_over)

    def tell(self, event: Event) -> tuple[Effect, ...]:
        self.state, self.effects = edge.step(self.state, event)
        return self.effects

    def is_told(self, *events: Event) -> Edge:
        for event in events:
            self.tell(event)
        return self

    @property
    def windows(self) -> list[int]:
        """Numbers of those in flight."""
        return [flight.number for flight in self.state.in_flight]

    @property
    def messages(self) -> list[DraftWindow]:
        """Windows among the last effects."""
        sends = [e.message for e in self.effects if isinstance(e, Send)]
        return [message for message in sends if isinstance(message, DraftWindow)]


def opened(incarnation: int = 1, handle: int = 1, now_ms: float = 5.0) -> Opened:
    return Opened(SessionReady("s1", incarnation, "cloud-1", handle), now_ms)


READY = opened()
START = Started(frozenset({EOS}), now_ms=0.0)


def opening(spec: edge.SessionSpec = SPEC) -> Edge:
    return Edge(spec).is_told(START)


def running(spec: edge.SessionSpec = SPEC) -> Edge:
    """Open, while the first window is being drafted."""
    return opening(spec).is_told(READY)


def waiting(spec: edge.SessionSpec = SPEC) -> Edge:
    """The first window is in flight since t = 10 ms; one that drafts on is at the second."""
    return running(spec).is_told(drafted(1, 3, TOKENS))


def three_in_flight(spec: edge.SessionSpec = AHEAD) -> Edge:
    """Windows 10 … 13, 20 … 23 and 30 … 33."""
    session = waiting(spec).is_told(drafted(2, 7, (20, 21, 22, 23)))
    return session.is_told(drafted(3, 11, (30, 31, 32, 33)))


def finished() -> Edge:
    return waiting().is_told(Ended(FinishReason.CANCELLED))


def judged(outcome: Outcome, num_accepted: int, num_committed: int, **changes: Any) -> WindowJudged:
    """The fact of the first window."""
    facts = WindowJudged(
        incarnation=1, number=1, outcome=outcome, num_drafted=4, num_accepted=num_accepted,
        num_committed=num_committed, rolled_back=outcome is not Outcome.ACCEPTED,
        length=3 + num_committed, threshold=0.02, window=4, credit=0.0, budget=4, in_flight=4,
        draft_ms=6.0, verify_ms=10.0, queue_ms=1.0, pass_tokens=4, rtt_ms=9.0, at_ms=30.0,
    )  # fmt: skip
    return replace(facts, **changes)


def fault(code: FaultCode, handle: int | None = None) -> FaultArrived:
    return FaultArrived(Fault("s1", code, "why", handle), 30.0)


UNKNOWN = fault(FaultCode.UNKNOWN_SESSION, handle=1)
