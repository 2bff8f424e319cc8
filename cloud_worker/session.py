"""One session in the cloud worker's shell: runs the effects of `decoding.cloud` in order.

Model work goes to the scheduler; a rollback goes with the next piece of it, as the model is called
on its own thread alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from bus.protocol.messages import Message, OpenSession
from cloud_worker.afterwards import Afterwards
from cloud_worker.scheduler import Scheduler
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
    ReportWindow,
    Send,
    WindowArrived,
)
from decoding.engine import Target
from decoding.methods import Method
from decoding.story import Story
from decoding.verification import window_report
from engines.energy import PowerGauge
from engines.thread import now_ms


class SendToEdge(Protocol):
    """Delivers messages to an edge, given its id; they arrive together."""

    def __call__(self, edge: str, *messages: Message) -> None: ...


class CloudSession:
    """State machine and cache of one session.

    Attributes:
        cache, state: also read on the model thread.
        story: what happened to it last.

    Args:
        gauge: measures the energy of passes.
        send: delivers messages to an edge.
        report: delivers a message to the controller.
    """

    def __init__(
        self,
        target: Target[Any],
        scheduler: Scheduler[Any],
        gauge: PowerGauge,
        send: SendToEdge,
        report: Callable[[Message], None],
    ) -> None:
        self._target = target
        self._scheduler = scheduler
        self._gauge = gauge
        self._send = send
        self._report = report
        self._keep: int | None = None
        self._afterwards = Afterwards()
        self._idle = asyncio.Event()
        self._idle.set()
        self.cache: Any = None
        self.state: cloud.CloudState
        self.closed = False
        self.story = Story()
        self.stale_logged = 0  # the incarnation up to which an older one's message was logged
        self.last_used_ms = now_ms()

    @property
    def busy(self) -> bool:
        """Whether work of it waits or runs."""
        return not self._idle.is_set()

    async def wait_idle(self) -> None:
        """Return once no work waits or runs."""
        await self._idle.wait()

    def begin(self, message: OpenSession, method: Method, name: str, limits: cloud.Limits) -> None:
        """Open; the message has passed `cloud.check_open`.

        Raises:
            Exception: what the engine raises; then there is nothing to close.
        """
        self.state, effects = cloud.begin(message, method, name, limits)
        self.story.begun(now_ms(), message)
        self.cache = self._target.open(self.state.sampling)
        self._run(effects)

    def handle(self, event: Event) -> None:
        """One event in, its effects out. Messages of an older life do not keep it alive."""
        at_ms = now_ms()
        before = self.state.stage
        self.state, effects = cloud.step(self.state, event)
        self.story.told(at_ms, event, effects, before.value, self.state.stage.value)
        if not isinstance(event, OpenArrived | WindowArrived) or (
            event.message.incarnation == self.state.incarnation
        ):
            self.last_used_ms = at_ms
        self._run(effects)

    def completed(self, event: Event) -> None:
        """The work that was waited for is done."""
        self._idle.set()
        self.handle(event)

    def close(self) -> None:
        """Forget work that waits; the cache goes back to the target, on the model thread. Reports
        that wait are made first: after its end they would open the session anew."""
        self._afterwards.run()
        self.closed = True
        self._idle.set()
        self._scheduler.close(self)

    def _run(self, effects: tuple[Effect, ...]) -> None:
        """Feedback of one pass goes together: the edge must not draft after the first of it what
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
                    self._afterwards.add(partial(self._report_window, effect))
                case Crop(length):
                    self._keep = length if self._keep is None else min(self._keep, length)
                case Prefill() | Forward() | FetchRow():
                    keep, self._keep = self._keep, None
                    self._idle.clear()
                    self._scheduler.submit(self, effect, keep)

    def _report_window(self, effect: ReportWindow) -> None:
        state, feedback, verified = self.state, effect.feedback, effect.verification
        own_ms = feedback.verify_ms * verified.share if feedback.pass_tokens else 0.0
        self._report(
            window_report(
                verified, feedback, state.edge, state.client, state.method.name,
                self._gauge.joules(own_ms / 1e3),
            )
        )  # fmt: skip
