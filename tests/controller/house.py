"""A running controller on a real Valkey and real sockets, and those who talk to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec.structs import replace

from bus.protocol.messages import (
    ControlUpdate,
    Message,
    Outcome,
    SessionOpened,
    WindowReport,
)
from bus.runtime.worker import Lifecycle, new_record
from bus.store import SessionRecord, Store
from bus.transport.sockets import Sockets
from controller.server import Controller
from decoding.control import ControlState, FixedPolicy

PATIENCE_S = 20.0
OPENED = SessionOpened("s1", "c1", "edge-1", "cloud-1", "sd", 1)
REPORT = WindowReport(
    session="s1", incarnation=1, number=1, edge="edge-1", client="c1", method="sd",
    outcome=Outcome.ACCEPTED, num_drafted=2, num_accepted=2, num_own=1, threshold=0.25,
    expected_accepted=1.5, mean_jsd=0.25, edge_ms=1.0, cloud_ms=2.0, rework_ms=3.0,
    verify_ms=10.0, queue_ms=0.5, energy_j=None, num_scored=1, log_likelihood=-0.5, num_greedy=1,
    regret=0.25,
)  # fmt: skip
OWN = replace(REPORT, number=0, outcome=Outcome.OWN, num_drafted=0, num_accepted=0, num_own=32)
POLICY = FixedPolicy(threshold=0.125, window=4)


async def eventually(condition: Callable[[], Awaitable[Any]]) -> Any:
    async def wait() -> Any:
        while not (answer := await condition()):  # noqa: ASYNC110 - polls other processes
            await asyncio.sleep(0.005)
        return answer

    return await asyncio.wait_for(wait(), PATIENCE_S)


class House:
    """A running controller, a cloud worker's way to it, and an edge that listens."""

    def __init__(self, controller: Controller, store: Store, sockets: Sockets, boot: str) -> None:
        self.controller, self.store, self.sockets = controller, store, sockets
        settings = controller._settings
        self.record = controller.describe(new_record(settings, "controller"))
        self.lifecycle = Lifecycle(settings, store, self.record)
        self.outbox = sockets.outbox(self.record.endpoints["reports"])
        self.heard: dict[str, list[Any]] = {}
        self.tasks = [
            asyncio.create_task(job)
            for job in (
                controller.receive(), controller.save_forever(),
                controller.repeat_forever(self.lifecycle),
                self._listen("edge-1"), self._listen("edge-2"),
            )
        ]  # fmt: skip

    async def _listen(self, edge: str) -> None:
        heard = self.heard.setdefault(edge, [])
        listener = self.sockets.listener(self.record.endpoints["updates"], edge)
        await listener.deliver(lambda message, _size: heard.append(message))

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.outbox.send(message)

    async def update(self, session: str, edge: str = "edge-1", **expected: Any) -> ControlUpdate:
        """The first update for this session from now on, with these fields."""
        self.heard[edge].clear()

        async def found() -> ControlUpdate | None:
            return next(
                (m for m in self.heard[edge] if m.session == session
                 and all(getattr(m, name) == value for name, value in expected.items())), None,
            )  # fmt: skip

        update: ControlUpdate = await eventually(found)
        return update

    async def saved(self, session: str, **expected: Any) -> SessionRecord:
        async def found() -> SessionRecord | None:
            record = await self.store.sessions.load(session)
            if record is None or any(getattr(record, k) != v for k, v in expected.items()):
                return None
            return record

        record: SessionRecord = await eventually(found)
        return record

    async def stop(self) -> None:
        for task in self.tasks:
            if task.done():
                task.result()
            assert not task.done(), "the controller lives on"
        # Once may get lost: `bus.runtime.worker._stop`.
        while not all(task.done() for task in self.tasks):
            for task in self.tasks:
                task.cancel()
            await asyncio.wait(self.tasks, timeout=0.1)
        self.sockets.close()


Start = Callable[..., Awaitable[House]]


class Counting:
    """Raises version and window with every report."""

    def initial(self, history: tuple[float, ...] = ()) -> ControlState:
        return ControlState(threshold=0.1, window=1, history=history)

    def after(self, state: ControlState, report: WindowReport) -> ControlState:
        return ControlState(
            0.1, state.window + 1, credit=0.5, credit_delta=0.25, version=state.version + 1,
            history=(*state.history, 0.25), held=3, drop=0.5,
        )  # fmt: skip
