"""One session of the cloud's machine, for tests: an event in, the effects out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from bus.protocol.arrays import pack_tokens
from bus.protocol.bounds import SessionCoupling
from bus.protocol.messages import (
    Ack,
    DraftRows,
    DraftWindow,
    Feedback,
    OpenSession,
    Outcome,
    SessionOpened,
    SessionReady,
)
from decoding import cloud, methods
from decoding.cloud_events import (
    AckArrived,
    Event,
    Forward,
    Prefilled,
    PrehitFailed,
    Report,
    ReportWindow,
    RowsReady,
    Send,
    WindowArrived,
)
from decoding.engine import Choice, TargetRow
from decoding.methods.base import Flow, PaceView, Proposal
from decoding.methods.exact import ExactRule
from decoding.sampling import SamplingParams
from decoding.verification import Judged, Plan
from tests.sessions import OPENING, PROMPT, drafted_rows, drafted_window

__all__ = ["PROMPT"]

LIMITS = cloud.Limits(vocab_size=100, context_length=64, threshold_min=-0.5, threshold_max=0.3)
OPEN = OPENING
CHOSEN = msgspec.structs.replace(OPEN, temperature=1.0)
RESIDUAL = msgspec.structs.replace(CHOSEN, coupling=SessionCoupling.RESIDUAL)
READY = Send(SessionReady("s1", 1, "cloud-1", 1))
OPENED = Report(SessionOpened("s1", "c1", "edge-1", "cloud-1", "sd", 1))
PREFILLED = Prefilled(1, 50.0)


class AnyPace:
    """Not lockstep; the cloud asks no more of a pace."""

    name, forecasts = "ahead", False

    def flow(self, view: PaceView) -> Flow:
        return Flow(view.window, 3 * view.window, awaits=False)


class Below50(ExactRule):
    """A lossy rule: tokens below 50 are as good as the target's own."""

    lossless = False

    def accepts(
        self, proposal: Proposal, row: TargetRow, params: SamplingParams, position: int,
        threshold: float,
    ) -> bool:  # fmt: skip
        return proposal.token < 50


SD = methods.sd.METHOD
AHEAD = dataclasses.replace(SD, pace=AnyPace())
RUNS_ON = dataclasses.replace(AHEAD, runs_on=True)
LOSSY = dataclasses.replace(AHEAD, acceptance=Below50())
LOSSY_ON = dataclasses.replace(LOSSY, runs_on=True)


@dataclass(frozen=True)
class Reported:
    """What a `ReportWindow` says, comparable."""

    number: int
    outcome: Outcome
    num_accepted: int
    own: int | None = None
    reached: int = 0


class Cloud:
    """A session at the cloud, given events one by one; `pass_begins` and `ran` are the model's."""

    def __init__(
        self, message: OpenSession = OPEN, method: methods.Method = SD,
        limits: cloud.Limits = LIMITS,
    ) -> None:  # fmt: skip
        self.judged: list[Judged] = []
        self.plan: Plan | None = None
        self.state, effects = cloud.begin(message, method, "cloud-1", limits, 1)
        self.effects = self._comparable(effects)

    def tell(self, event: Event) -> tuple[Any, ...]:
        self.state, effects = cloud.step(self.state, event)
        self.effects = self._comparable(effects)
        return self.effects

    def is_told(self, *events: Event) -> Cloud:
        for event in events:
            self.tell(event)
        return self

    @property
    def text(self) -> tuple[int, ...]:
        return self.state.tokens

    def pass_begins(self) -> Plan:
        """The model is free: what is known now is in the pass."""
        self.plan = cloud.plan(self.state, Forward(self.state.job))
        return self.plan

    def ran(
        self, *own: int, p: tuple[float, ...] = (), verify_ms: float = 10.0, now_ms: float = 115.0,
        share: float = 1.0,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The pass is over; in its rows the target would itself write these tokens."""
        done, self.plan = self.plan or self.pass_begins(), None
        num_rows = len(done.row_ids) + (done.prehit is not None)
        assert len(own) == num_rows, f"the pass has {num_rows} rows"
        rows = tuple(row(token, *p[i : i + 1]) for i, token in enumerate(own))
        ready = RowsReady(self.state.job, done, rows, verify_ms, now_ms, share)
        return self.tell(ready)

    def prehit_failed(self, own: int, now_ms: float = 107.0) -> tuple[Any, ...]:
        """The kept row rejects the first token; the target would itself write `own`."""
        done, self.plan = self.plan or self.pass_begins(), None
        assert done.prehit is not None
        return self.tell(PrehitFailed(self.state.job, done, row(own, 0.0), now_ms))

    def has_run(self, *own: int, **ran: Any) -> Cloud:
        self.ran(*own, **ran)
        return self

    def writes(self, *own: int) -> Cloud:
        """One pass without drafts for each token."""
        for token in own:
            self.ran(token)
        return self

    def _comparable(self, effects: tuple[Any, ...]) -> tuple[Any, ...]:
        def one(effect: Any) -> Any:
            if not isinstance(effect, ReportWindow):
                return effect
            judged = effect.judged
            self.judged.append(judged)
            return Reported(
                judged.window.message.number, judged.outcome, judged.num_accepted, judged.own,
                judged.reached,
            )  # fmt: skip

        return tuple(one(effect) for effect in effects)


def row(own: int, p: float = 0.5) -> TargetRow:
    """A row whose first choice is `own`, which gives the drafted token probability `p`."""
    at_q = np.array([0.5, 0.25]), np.array([p, 0.1])
    return TargetRow(own, *at_q, 0.5, choice=Choice(own, 1.0))


def window(
    tokens: tuple[int, ...] = (10, 11, 12), after: tuple[int, ...] = PROMPT,
    rows: bool | DraftRows = False, **changes: Any,
) -> DraftWindow:  # fmt: skip
    made = rows if isinstance(rows, DraftRows) else drafted_rows(tokens) if rows else None
    return drafted_window(after, tokens, rows=made, **changes)


def arrives(message: DraftWindow, now_ms: float = 100.0) -> WindowArrived:
    return WindowArrived(message, now_ms)


def acked(length: int, number: int = 9, again: bool = False, now_ms: float = 200.0) -> AckArrived:
    return AckArrived(Ack(1, number, length, again), now_ms)


def feedback(start: int, tokens: tuple[int, ...], **changes: Any) -> Send:
    """Of a pass of four tokens, over 15 ms after window 1 came."""
    plain = Feedback(
        handle=1, start=start, tokens=pack_tokens(tokens), number=1, held_ms=15.0, verify_ms=10.0,
        queue_ms=5.0, pass_tokens=4,
    )  # fmt: skip
    return Send(msgspec.structs.replace(plain, **changes))


def repeated(start: int, tokens: tuple[int, ...]) -> Send:
    """Feedback without a pass."""
    return feedback(
        start, tokens, number=None, held_ms=0.0, verify_ms=0.0, queue_ms=0.0, pass_tokens=0
    )


def idle(message: OpenSession = OPEN, method: methods.Method = SD, **limits: Any) -> Cloud:
    """The prompt has run; one that runs on has asked for a pass."""
    made = Cloud(message, method, msgspec.structs.replace(LIMITS, **limits))
    return made.is_told(PREFILLED)


def verifying(message: OpenSession = OPEN, method: methods.Method = SD) -> Cloud:
    session = idle(message, method)
    rows = method.needs_rows(session.state.sampling)
    return session.is_told(arrives(window(rows=rows)))


def recovering() -> Cloud:
    """The second of three tokens is rejected, with residual coupling."""
    return verifying(RESIDUAL).has_run(0, 0, 0, 50, p=(1.0, 0.0, 1.0))


def after_rejection() -> Cloud:
    """Tokens 1 2 3 10 60; the window was 10 11 12."""
    return verifying().has_run(10, 60, 7, 7)
