"""One session of the cloud's machine, for tests: an event in, the effects out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from bus.protocol.messages import (
    DraftWindow,
    Feedback,
    OpenSession,
    Outcome,
    SessionOpened,
    SessionReady,
)
from decoding import cloud, methods
from decoding.cloud_events import (
    Event,
    Forward,
    Prefilled,
    Report,
    ReportWindow,
    RowsReady,
    Send,
    WindowArrived,
)
from decoding.engine import TargetRow
from tests.sessions import OPENING, drafted_window

LIMITS = cloud.Limits(vocab_size=100, context_length=64, threshold_min=-0.5, threshold_max=0.3)
SD = methods.sd.METHOD
PROMPT = (1, 2, 3)
OPEN = OPENING
SAMPLED = msgspec.structs.replace(OPEN, temperature=1.0)
READY = Send(SessionReady("s1", 1, "cloud-1"))
OPENED = Report(SessionOpened("s1", "c1", "edge-1", "cloud-1", "sd", 1))
PROBS = np.array([0.75, 0.25], dtype=np.float16)


@dataclass(frozen=True)
class Run:
    """A `Forward`, comparable."""

    job: int
    feed: tuple[int, ...]
    row_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Reported:
    """A `ReportWindow`, comparable."""

    feedback: Feedback


class Cloud:
    """A session at the cloud, told events one by one."""

    def __init__(self, message: OpenSession = OPEN, method: methods.Method = SD) -> None:
        self.state, effects = cloud.begin(message, method, "cloud-1", LIMITS)
        self.effects = comparable(effects)

    def tell(self, event: Event) -> tuple[Any, ...]:
        self.state, effects = cloud.step(self.state, event)
        self.effects = comparable(effects)
        return self.effects

    def is_told(self, *events: Event) -> Cloud:
        for event in events:
            self.tell(event)
        return self


def comparable(effects: tuple[Any, ...]) -> tuple[Any, ...]:
    def one(effect: Any) -> Any:
        match effect:
            case Forward(job, feed, row_ids):
                return Run(job, feed, tuple(tuple(ids.tolist()) for ids in row_ids))
            case ReportWindow(_, feedback):
                return Reported(feedback)
            case _:
                return effect

    return tuple(one(effect) for effect in effects)


def window(start: int = 3, tokens: tuple[int, ...] = (10, 11, 12), **changes: Any) -> DraftWindow:
    return drafted_window(start, tokens, **changes)


def arrives(message: DraftWindow, now_ms: float = 100.0) -> WindowArrived:
    return WindowArrived(message, now_ms)


def rows(job: int, *argmaxes: int, p: tuple[float, ...] = (), now_ms: float = 115.0) -> RowsReady:
    """Rows of a pass; `p[i]` is the target's probability of the i-th drafted token."""
    at_q = [np.array([p[i], 0.1]) if i < len(p) else np.empty(0) for i in range(len(argmaxes))]
    made = tuple(
        TargetRow(argmax, np.array([0.5, 0.25]), at_q[i], 0.5) for i, argmax in enumerate(argmaxes)
    )
    return RowsReady(job, made, verify_ms=10.0, now_ms=now_ms)


def feedback(
    outcome: Outcome, num_accepted: int, length: int, next_token: int | None, **changes: Any
) -> Feedback:
    plain = Feedback(
        session="s1",
        incarnation=1,
        epoch=0,
        seq=0,
        committed_length=length,
        outcome=outcome,
        num_accepted=num_accepted,
        next_token=next_token,
        threshold=0.1,
        verify_ms=10.0,
        queue_ms=5.0,
        pass_tokens=4,
    )
    return msgspec.structs.replace(plain, **changes)


def answered(message: Feedback) -> tuple[Any, ...]:
    return Send(message), Reported(message)


PREFILLED = Prefilled(1, 50.0)
ALL_ACCEPTED = feedback(Outcome.ACCEPTED, 3, 7, 50)
ONE_ACCEPTED = feedback(Outcome.PARTIAL, 1, 5, 60)


def idle(message: OpenSession = OPEN) -> Cloud:
    return Cloud(message).is_told(PREFILLED)


def verifying(message: OpenSession = OPEN) -> Cloud:
    return idle(message).is_told(arrives(window()))


def recovering() -> Cloud:
    return verifying(SAMPLED).is_told(rows(2, 0, 0, 0, p=(1.0, 0.0, 1.0)))


def after_rejection() -> Cloud:
    """Tokens 1 2 3 10 60, epoch 1; the window was 10 11 12."""
    return verifying().is_told(rows(2, 10, 60, 7, 7))


FIRST_PASS = Run(2, (3, 10, 11, 12), ((10, 0), (11, 0), (12, 0), ()))
