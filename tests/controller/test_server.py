"""The controller on a real Valkey and real sockets."""

from __future__ import annotations

import msgspec
import zmq
import zmq.asyncio

from bus.protocol.messages import (
    ControlUpdate,
    SessionClosed,
)
from bus.store import ReportEntry, WorkerRecord
from decoding.control import FixedPolicy
from tests.controller.house import (
    OPENED,
    OWN,
    REPORT,
    Counting,
    Start,
    eventually,
)


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


async def test_a_changed_decision_is_saved_and_published(start: Start) -> None:
    house = await start(Counting())
    house.send(OPENED, REPORT, REPORT)
    update = await house.update("s1", version=3)
    assert (update.window, update.credit, update.credit_delta) == (3, 0.5, 0.25)
    record = await house.saved("s1", version=3)
    assert (record.window, record.credit, record.credit_delta) == (3, 0.5, 0.25)


async def test_passes_without_drafts_change_no_credit_and_are_traced(start: Start) -> None:
    house = await start(Counting(), reports=True)
    house.send(OPENED, OWN, REPORT, OWN, OWN)
    house.send(SessionClosed("s1", "cloud-1", 1, "length"), OWN)

    async def traced() -> list[ReportEntry]:
        entries = [entry for _, entry in await house.store.telemetry.read()]
        reports = [entry for entry in entries if isinstance(entry, ReportEntry)]
        return reports if len(reports) == 5 else []

    entries = await eventually(traced)
    assert [(e.outcome, e.num_own, e.credit) for e in entries] == [
        ("own", 32, 0.0), ("accepted", 1, 0.0), *[("own", 32, 0.5)] * 3,
    ]  # fmt: skip
    (ended,) = await house.store.sessions.ended()
    assert (ended.version, ended.history) == (2, (0.25,))


async def test_a_session_that_moves_keeps_what_was_decided_for_it(start: Start) -> None:
    house = await start(Counting())
    house.send(OPENED, REPORT)
    house.send(msgspec.structs.replace(OPENED, cloud="cloud-2", incarnation=2))
    assert (await house.saved("s1", cloud="cloud-2")).version == 2


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


async def test_other_settings_reach_a_session_that_was_taken_up(start: Start) -> None:
    first = await start()
    first.send(OPENED)
    await first.saved("s1")
    await first.stop()
    second = await start(FixedPolicy(threshold=0.25, window=8))
    second.send(REPORT)
    update = await second.update("s1", version=2)
    assert (update.term, update.threshold, update.window) == (2, 0.25, 8)


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
