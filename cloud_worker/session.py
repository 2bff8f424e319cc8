"""One session in the cloud worker's shell: runs the effects of `decoding.cloud` in order.

Its state machine lives on the model thread, beside the passes it asks for: what a pass decides is
decided there, feedback leaves from there, and the next pass begins without a word to the event
loop. What arrives is posted to that thread; reports are made on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from bus.protocol.messages import Message, OpenSession
from cloud_worker.afterwards import Afterwards
from cloud_worker.scheduler import Scheduler
from cloud_worker.watch import SessionWatch
from decoding import cloud
from decoding.cloud_events import (
    Crop,
    Effect,
    Event,
    FetchRow,
    Forward,
    OpenArrived,
    Prefill,
    Report,
    ReportOwn,
    ReportTree,
    ReportWindow,
    Send,
)
from decoding.engine import Target
from decoding.methods import Method
from decoding.story import Story
from decoding.tree_reports import JudgedTree, tree_report
from decoding.verification import OwnPasses, Reported, own_report, window_report
from engines.energy import PowerGauge
from engines.thread import ModelThread, now_ms


class SendToEdge(Protocol):
    """Delivers messages to an edge, given its id; they arrive together."""

    def __call__(self, edge: str, *messages: Message) -> None: ...


class CloudSession:
    """State machine and cache of one session.

    Attributes:
        cache, state: the model thread's; the state may be read anywhere.
        edge, incarnation, handle: whose it is, by the latest message that opened it.
        story: what happened to it last. watch: follows it for metrics and traces.

    Args:
        gauge: measures the energy of passes.
        send: delivers messages to an edge, from any thread.
        report: delivers a message to the controller, on the event loop.
        failed: gets what an event raises, on the event loop.
    """

    def __init__(
        self,
        target: Target[Any],
        scheduler: Scheduler[Any],
        thread: ModelThread,
        gauge: PowerGauge,
        send: SendToEdge,
        report: Callable[[Message], None],
        failed: Callable[[CloudSession, Exception], None],
    ) -> None:
        self._target = target
        self._scheduler = scheduler
        self._thread = thread
        self._gauge = gauge
        self._send = send
        self._report = report
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._crops: tuple[Crop, ...] = ()
        self._afterwards = Afterwards()
        self.cache: Any = None
        self.state: cloud.CloudState
        self.closed = False
        self.edge = ""
        self.incarnation = self.handle = 0
        self.story = Story()
        self.watch: SessionWatch
        self.stale_logged = 0  # the incarnation up to which an older one's message was logged
        self.last_used_ms = now_ms()

    @property
    def busy(self) -> bool:
        """Whether work of it waits or runs."""
        return not isinstance(self.state.stage, cloud.Idle)

    # --- on the event loop --------------------------------------------------------------------

    def begin(
        self, message: OpenSession, method: Method, name: str, limits: cloud.Limits, handle: int
    ) -> None:
        """Open; the message has passed `cloud.check_open`.

        Raises:
            Exception: what the engine raises; then there is nothing to close.
        """
        self._opened(message, handle)
        self.state, effects = cloud.begin(message, method, name, limits, handle)
        self.story.begun(now_ms(), message)
        self.cache = self._target.open(self.state.sampling, method.speculator)
        self._tell(self._run(effects, self._scheduler.submit))

    def open_again(self, message: OpenSession, handle: int) -> None:
        """The message has passed `cloud.check_reopen`; `handle` is for a higher incarnation. A
        repeated one is answered at once: the model thread may be in a long pass."""
        if message.incarnation == self.incarnation:
            self.last_used_ms = now_ms()
            self._send(self.edge, cloud.ready(self.state, self.incarnation, self.handle))
            return
        self._opened(message, handle)
        self.post(OpenArrived(message, handle))

    def _opened(self, message: OpenSession, handle: int) -> None:
        self.edge, self.incarnation, self.handle = message.edge, message.incarnation, handle

    def post(self, event: Event) -> None:
        """Something has arrived for the session."""
        self.last_used_ms = now_ms()
        self._thread.post(partial(self.completed, event))

    def _tell(self, effects: list[Effect]) -> None:
        """Make reports; those of windows wait until feedback has left."""
        if self.closed:
            return
        whose = self._whose()
        for effect in effects:
            match effect:
                case Report(message):
                    self._report(message)
                case ReportWindow():
                    self._afterwards.add(partial(self._report_window, effect, whose))
                case ReportTree(judged):
                    self._afterwards.add(partial(self._report_tree, judged, whose))
                case ReportOwn(own):
                    self._afterwards.add(partial(self._report_own, own, whose))
                case _:
                    pass

    def _whose(self) -> Reported:
        state = self.state
        return Reported(state.session, self.incarnation, self.edge, state.client, state.method.name)

    def _report_window(self, effect: ReportWindow, whose: Reported) -> None:
        judged = effect.judged
        own_ms = judged.verify_ms * judged.share if judged.pass_tokens else 0.0
        self._report(window_report(judged, whose, self._gauge.joules(own_ms / 1e3)))

    def _report_tree(self, judged: JudgedTree, whose: Reported) -> None:
        own_ms = judged.verify_ms * judged.share
        self._report(tree_report(judged, whose, self._gauge.joules(own_ms / 1e3)))

    def _report_own(self, own: OwnPasses, whose: Reported) -> None:
        self._report(own_report(own, whose, self._gauge.joules(own.model_ms / 1e3)))

    def close(self) -> None:
        """Forget work that waits; the cache goes back to the target, on the model thread. Reports
        that wait are made first: after its end they would open the session anew."""
        self.closed = True
        self._afterwards.run()
        own = self.state.own
        if own.num_tokens:
            self._report_own(own, self._whose())
        self._scheduler.close(self)

    # --- on the model thread ------------------------------------------------------------------

    def completed(self, event: Event) -> None:
        """One event in, its effects out: of work that is done, or of what has arrived."""
        if self.closed:
            return
        try:
            self._advance(event)
        except Exception as error:  # noqa: BLE001 - ends only this session
            self._to_loop(self._failed, self, error)

    def _advance(self, event: Event) -> None:
        at_ms, before = now_ms(), self.state.stage
        self.state, effects = cloud.step(self.state, event)
        after = self.state.stage
        try:
            told = self._run(effects, self._scheduler.take)
        finally:  # feedback first
            self.story.told(at_ms, event, effects, before.name, after.name)
        if told:
            self._to_loop(self._tell, told)

    def _run(
        self,
        effects: tuple[Effect, ...],
        take: Callable[[CloudSession, Prefill | Forward | FetchRow, tuple[Crop, ...]], None],
    ) -> list[Effect]:
        """Send feedback, that of one pass together, and ask for model work; a rollback goes with
        the next piece of it. Returns the rest, which is for the event loop."""
        messages = [effect.message for effect in effects if isinstance(effect, Send)]
        if messages:
            self._send(self.edge, *messages)
        told: list[Effect] = []
        for effect in effects:
            match effect:
                case Crop():
                    self._crops += (effect,)
                case Prefill() | Forward() | FetchRow():
                    crops, self._crops = self._crops, ()
                    take(self, effect, crops)
                case Send():
                    pass
                case _:
                    told.append(effect)
        return told

    def _to_loop(self, call: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has left
            self._loop.call_soon_threadsafe(call, *args)
