"""One session in the cloud worker's shell: runs the effects of `decoding.cloud` in order.

Model work goes to the worker's one model thread, a chunk of prefill or one pass at a time, so
sessions take turns. A crop rides along with the next job: no torch call is made in a coroutine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from bus.arrays import Float64Array
from bus.messages import Message, OpenSession
from cloud_worker.target_model import TargetCache, TargetModel
from decoding import cloud
from decoding.acceptance import TargetRow
from decoding.cloud_events import (
    Crop,
    Effect,
    Event,
    FetchRow,
    Forward,
    FullRowReady,
    Prefill,
    Prefilled,
    PrehitFailed,
    Report,
    ReportWindow,
    RowsReady,
    Send,
)
from decoding.methods import Method
from decoding.verification import window_report
from models.energy import PowerGauge
from models.thread import ModelThread, now_ms

AFTER_FEEDBACK_S = 0.002
"""A report waits this long: the feedback, which the edge waits for, leaves this core first."""


class SendToEdge(Protocol):
    """Delivers messages to an edge, given its id; they arrive together."""

    def __call__(self, edge: str, *messages: Message) -> None: ...


@dataclass(frozen=True, slots=True)
class Pass:
    """What the model thread gives back: rows, the kept one first; no windows: it rejected."""

    rows: list[TargetRow]
    verify_ms: float
    num_windows: int


class CloudSession:
    """State machine, cache and jobs of one session.

    Args:
        gauge: tells the energy of passes.
        send: delivers messages to an edge.
        report: delivers a message to the controller.
        failed: told about an exception that a model job raised.
    """

    def __init__(
        self,
        model: TargetModel,
        thread: ModelThread,
        gauge: PowerGauge,
        send: SendToEdge,
        report: Callable[[Message], None],
        failed: Callable[[CloudSession, Exception], None],
    ) -> None:
        self._model = model
        self._gauge = gauge
        self._send = send
        self._report = report
        self.turns = thread.turns(partial(failed, self))
        self._cache: TargetCache
        self._crop_to: int | None = None
        self.state: cloud.CloudState
        self.last_used_ms = now_ms()

    def begin(self, message: OpenSession, method: Method, name: str, limits: cloud.Limits) -> None:
        """Open; the message has passed `cloud.check_open`."""
        self.state, effects = cloud.begin(message, method, name, limits)
        self._cache = self._model.open(self.state.sampling)
        self._run(effects)

    def handle(self, event: Event) -> None:
        """One event in, its effects out."""
        self.last_used_ms = now_ms()
        self.state, effects = cloud.step(self.state, event)
        self._run(effects)

    def close(self) -> None:
        """Forget pending jobs; a pass that runs ends by itself and its result is discarded. The
        cache then goes to the model's prefix cache, on the model thread."""
        self.turns.close(partial(self._model.close, self._cache))

    def _run(self, effects: tuple[Effect, ...]) -> None:
        """Verdicts of one pass go together: the edge must not draft behind the first of them what
        a later one makes void."""
        messages = [effect.message for effect in effects if isinstance(effect, Send)]
        if messages:
            self._send(self.state.edge, *messages)
        for effect in effects:
            match effect:
                case Send():
                    pass
                case Report(message):
                    self._report(message)
                case ReportWindow():
                    asyncio.get_running_loop().call_later(
                        AFTER_FEEDBACK_S, self._report_window, effect
                    )
                case Crop(length):
                    pending = self._crop_to
                    self._crop_to = length if pending is None else min(pending, length)
                case Prefill():
                    self._prefill(effect)
                case Forward(job):
                    run = partial(self._pass, effect, self._take_crop())
                    self.turns.submit(run, partial(self._passed, job))
                case FetchRow(job, index):
                    fetch = partial(self._model.full_row, self._cache, index)
                    self.turns.submit(fetch, partial(self._fetched, job))

    def _report_window(self, effect: ReportWindow) -> None:
        state, feedback = self.state, effect.feedback
        own_pass_ms = feedback.verify_ms if feedback.pass_tokens else 0.0
        self._report(
            window_report(
                effect.verification, feedback, state.edge, state.client, state.method.name,
                self._gauge.joules(own_pass_ms / 1e3),
            )
        )  # fmt: skip

    def _take_crop(self) -> int | None:
        crop_to, self._crop_to = self._crop_to, None
        return crop_to

    def _prefill(self, effect: Prefill) -> None:
        """In chunks, so that other sessions get their turns between them."""
        tokens, crop_to = self.turns.prefill(effect.tokens, self._take_crop(), self._run_chunk)
        self.turns.submit(
            partial(self._run_chunk, tokens, crop_to), partial(self._prefilled, effect.job)
        )

    def _prefilled(self, job: int, _: None) -> None:
        self.handle(Prefilled(job, now_ms()))

    def _passed(self, job: int, result: Pass) -> None:
        if result.num_windows:
            rows, verify_ms = tuple(result.rows), result.verify_ms
            self.handle(RowsReady(job, rows, verify_ms, now_ms(), result.num_windows))
        else:
            self.handle(PrehitFailed(job, result.rows[0], now_ms()))

    def _fetched(self, job: int, probs: Float64Array) -> None:
        self.handle(FullRowReady(job, probs, now_ms()))

    # --- on the model thread --------------------------------------------------------------

    def _run_chunk(self, chunk: tuple[int, ...], crop_to: int | None) -> None:
        self._crop(crop_to)
        self._model.prefill(self._cache, chunk)

    def _pass(self, forward: Forward, crop_to: int | None) -> Pass:
        """Roll the cache back and run, with all windows that wait by now; both are model time."""
        began_ms = now_ms()
        self._crop(crop_to)
        kept: list[TargetRow] = []
        prehit = forward.prehit
        if prehit is not None:
            kept = [self._model.reduce_row(self._cache, prehit.index, prehit.proposal.ids)]
            if not prehit.passes(kept[0]):
                return Pass(kept, 0.0, num_windows=0)
        forward = cloud.extended(self.state, forward)
        self._gauge.begin()
        rows, pass_ms = self._model.forward(self._cache, forward.feed, forward.row_ids)
        self._gauge.end(pass_ms / 1e3)
        return Pass(kept + rows, now_ms() - began_ms, forward.num_windows)

    def _crop(self, crop_to: int | None) -> None:
        if crop_to is not None:
            self._model.crop(self._cache, min(crop_to, self._cache.length))
