"""One session of the edge's machine, for tests: an event in, the effects out."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from bus.protocol.arrays import Float16Array, Int32Array
from bus.protocol.bounds import SessionCoupling
from bus.protocol.messages import (
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
    Opened,
    Started,
    WindowJudged,
)
from decoding.sampling import SamplingParams
from tests.sessions import OPENING, drafted_window

PROMPT = (1, 2, 3)
EOS = 99
SPEC = edge.SessionSpec(
    session="s1",
    client="c1",
    edge="edge-1",
    method=methods.sd.METHOD,
    prompt=PROMPT,
    sampling=SamplingParams(coupling=SessionCoupling.RESIDUAL),
    max_new_tokens=20,
    tokenizer_digest="digest",
)
SAMPLED = replace(SPEC, sampling=SamplingParams(0.7, 0.9, 40, 5, SessionCoupling.RESIDUAL))
CONTROL = edge.Control(threshold=0.15, window=4, conservative_threshold=0.02)
OPEN = msgspec.structs.replace(OPENING, seed=0)


def rows(tokens: tuple[int, ...]) -> tuple[Int32Array, Float16Array]:
    """What a draft with K = 2 would send for these tokens."""
    ids = np.array([[token, 0] for token in tokens], dtype=np.int32)
    return ids, np.tile(np.array([0.75, 0.25], dtype=np.float16), (len(tokens), 1))


def drafted(job: int, start: int, tokens: tuple[int, ...], now_ms: float = 10.0) -> Drafted:
    ids, probs = rows(tokens) if tokens else (np.empty((0, 2), np.int32), np.empty((0, 2), "<f2"))
    num_cached = start + max(len(tokens) - 1, 0)
    return Drafted(job, start, num_cached, tokens, ids, probs, draft_ms=6.0, now_ms=now_ms)


def window(start: int, tokens: tuple[int, ...], **changes: Any) -> DraftWindow:
    ids, probs = rows(tokens)
    first: dict[str, Any] = {
        "q_ids": ids.tobytes(), "q_probs": probs.tobytes(), "threshold": 0.02,
        "edge_ms": 0.0, "rework_ms": 0.0, "rtt_ms": 0.0,
    }  # fmt: skip
    return drafted_window(start, tokens, **first | changes)


def feedback(outcome: Outcome, num_accepted: int, length: int, next_token: int | None,
             **changes: Any) -> Feedback:  # fmt: skip
    plain = Feedback(
        session="s1",
        incarnation=1,
        epoch=0,
        seq=0,
        committed_length=length,
        outcome=outcome,
        num_accepted=num_accepted,
        next_token=next_token,
        threshold=0.02,
        verify_ms=10.0,
        queue_ms=1.0,
        pass_tokens=4,
    )
    return msgspec.structs.replace(plain, **changes)


ALL_ACCEPTED = feedback(Outcome.ACCEPTED, 4, 8, 50)
TWO_ACCEPTED = feedback(Outcome.PARTIAL, 2, 6, 60)
UNKNOWN = feedback(Outcome.UNKNOWN_SESSION, 0, 0, None)
WINDOW = window(3, (10, 11, 12, 13))


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


READY = Opened(SessionReady("s1", 1, "cloud-1"), now_ms=5.0)
START = Started(frozenset({EOS}), now_ms=0.0)


def opening(spec: edge.SessionSpec = SPEC) -> Edge:
    return Edge(spec).is_told(START)


def running(spec: edge.SessionSpec = SPEC) -> Edge:
    """Open, while the first window is being drafted."""
    return opening(spec).is_told(READY)


def waiting(spec: edge.SessionSpec = SPEC) -> Edge:
    """The first window is in flight since t = 10 ms."""
    return running(spec).is_told(drafted(1, 3, (10, 11, 12, 13)))


def finished() -> Edge:
    return waiting().is_told(Ended(FinishReason.CANCELLED))


def judged(message: Feedback, **changes: Any) -> WindowJudged:
    facts = WindowJudged(
        feedback=message,
        num_drafted=4,
        num_committed=0,
        rolled_back=False,
        window=4,
        credit=0.0,
        budget=4,
        in_flight=4,
        draft_ms=6.0,
        rtt_ms=9.0,
        at_ms=30.0,
    )
    return replace(facts, **changes)


def fault(code: FaultCode) -> FaultArrived:
    return FaultArrived(Fault("s1", code, "why"), 30.0)
