"""Registry, sessions and telemetry on a real Valkey."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
import pytest

from bus.store import (
    DraftSpan,
    PassSpan,
    ReportEntry,
    Role,
    Rollback,
    SessionEntry,
    SessionRecord,
    Store,
    TimelineEntry,
    Usage,
    WindowSpan,
    WorkerRecord,
)
from bus.store.keys import Keys
from tests.bus.test_results import WINDOW

CLOUD = WorkerRecord(
    worker_id="cloud-1",
    role=Role.CLOUD,
    boot="b1",
    endpoints={"windows": "tcp://127.0.0.1:5000"},
    model="SmolLM2",
    eos_tokens=(1, 2),
    counters={"faults": 3},
    capacity=8,
)
EDGE = WorkerRecord(worker_id="edge-1", role=Role.EDGE, boot="b2")


# --- registry -----------------------------------------------------------------------------------


async def test_workers_that_beat_are_listed(store: Store) -> None:
    await store.registry.beat(EDGE)
    await store.registry.beat(CLOUD)
    cloud, edge = await store.registry.workers()
    assert msgspec.structs.replace(cloud, expires_at=0.0) == CLOUD
    assert edge.worker_id == "edge-1"
    assert [record.worker_id for record in await store.registry.workers("edge")] == ["edge-1"]
    assert await store.registry.workers(Role.CONTROLLER) == []


async def test_expiry_is_by_the_clock_of_redis(store: Store, redis: Any) -> None:
    seconds, _ = await redis.time()
    await store.registry.beat(msgspec.structs.replace(EDGE, expires_at=1.0), ttl_s=100)
    (record,) = await store.registry.workers()
    assert seconds + 100 <= record.expires_at <= seconds + 200


@pytest.mark.parametrize("junk", ["{", '{"worker_id": "x", "y": ' + "[" * 100_000])
async def test_the_dead_and_the_unreadable_are_dropped(
    store: Store, redis: Any, keys: Keys, caplog: pytest.LogCaptureFixture, junk: str
) -> None:
    await store.registry.beat(EDGE)
    await store.registry.beat(CLOUD, ttl_s=0)
    await redis.hset(keys.workers, "junk", junk)
    assert [record.worker_id for record in await store.registry.workers()] == ["edge-1"]
    assert await redis.hkeys(keys.workers) == [b"edge-1"]
    assert "worker record b'junk' dropped" in caplog.text


async def test_a_beat_between_reading_and_dropping_survives(
    store: Store, redis: Any, keys: Keys
) -> None:
    await store.registry.beat(EDGE, ttl_s=0)
    stale = await redis.hget(keys.workers, "edge-1")
    await store.registry.beat(EDGE)
    connection = store._connection
    assert await connection.run_script("delete_unchanged", [keys.workers], ["edge-1", stale]) == 0
    assert len(await store.registry.workers()) == 1


async def test_a_worker_removes_itself_but_not_its_successor(store: Store) -> None:
    await store.registry.beat(EDGE)
    await store.registry.remove("edge-1", "older boot")
    assert len(await store.registry.workers()) == 1
    await store.registry.remove("edge-1", "b2")
    await store.registry.remove("edge-1", "b2")
    assert await store.registry.workers() == []


# --- sessions -----------------------------------------------------------------------------------


def session(term: int, version: int, threshold: float = 0.5, name: str = "s1") -> SessionRecord:
    return SessionRecord(
        session=name, client="c", edge="edge-1", cloud="cloud-1", method="sd", term=term,
        version=version, threshold=threshold, window=4, credit=0.25, credit_delta=-0.125,
        updated_at=1700000000.5,
    )  # fmt: skip


async def test_sessions_are_saved_loaded_listed_deleted(
    store: Store, redis: Any, keys: Keys
) -> None:
    assert await store.sessions.load("s1") is None
    assert await store.sessions.all() == []
    assert await store.sessions.save(session(1, 1))
    assert await store.sessions.save(session(1, 1, name="s2"))
    assert await store.sessions.load("s1") == session(1, 1)
    assert await store.sessions.all() == [session(1, 1), session(1, 1, name="s2")]
    assert 0 < await redis.ttl(keys.session("s1")) <= 3600
    await store.sessions.delete("s1")
    assert await store.sessions.all() == [session(1, 1, name="s2")]


@pytest.mark.parametrize(
    ("term", "version", "wins"), [(1, 9, False), (2, 4, False), (2, 6, True), (3, 1, True)]
)
async def test_only_a_newer_session_overwrites(
    store: Store, term: int, version: int, wins: bool
) -> None:
    await store.sessions.save(session(2, 5, threshold=0.1))
    assert await store.sessions.save(session(term, version, threshold=0.9)) is wins
    loaded = await store.sessions.load("s1")
    assert loaded is not None
    assert loaded.threshold == (0.9 if wins else 0.1)


async def test_saving_the_newest_again_renews_it_and_its_expiry(
    store: Store, redis: Any, keys: Keys
) -> None:
    await store.sessions.save(session(2, 5, threshold=0.1))
    await redis.expire(keys.session("s1"), 5)
    assert await store.sessions.save(session(2, 5, threshold=0.9))
    assert await redis.ttl(keys.session("s1")) > 5
    assert await store.sessions.load("s1") == session(2, 5, threshold=0.9)


async def test_the_end_of_a_session_is_remembered_for_a_while(
    store: Store, redis: Any, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    await store.sessions.save(session(2, 5))
    await store.sessions.end(session(2, 6))
    assert await store.sessions.all() == []
    assert await store.sessions.ended() == [session(2, 6)]
    assert 0 < await redis.ttl(keys.ended("s1")) <= 600
    await redis.set(keys.ended("bad"), "x")
    assert await store.sessions.ended() == [session(2, 6)]
    assert "end of a session skipped" in caplog.text


async def test_an_unreadable_session_is_skipped(store: Store, redis: Any, keys: Keys) -> None:
    await redis.hset(keys.session("bad"), mapping={"session": "bad", "term": "x"})
    assert await store.sessions.load("bad") is None
    assert await store.sessions.all() == []


async def test_every_controller_gets_a_term_of_its_own(store: Store) -> None:
    terms = await asyncio.gather(*(store.sessions.next_term() for _ in range(5)))
    assert sorted(terms) == [1, 2, 3, 4, 5]


# --- telemetry ----------------------------------------------------------------------------------

SESSION = SessionEntry(
    at_ms=2, request="r", session="s", client="c", edge="e", cloud="k", method="sd",
    finish_reason="stop", usage=Usage(prompt_tokens=3, acceptance=0.75, lossless=False),
)  # fmt: skip


TIMELINE = TimelineEntry(
    at_ms=3, request="r", session="s", client="c", edge="e", cloud="k", method="plc",
    events=(
        DraftSpan(0.5, 20.0, 3, 4), PassSpan(1.5, 11.5, 1),
        WindowSpan(20.0, 1, 3, 4, 61.5, "partial", 1, 40.0, 0.5, 5, 9.0), Rollback(61.5, 5),
    ),
)  # fmt: skip


REPORT = ReportEntry(
    at_ms=4, request="", session="s", client="c", edge="e", cloud="k", method="e2sci",
    incarnation=1, number=2, outcome="partial", num_drafted=4, num_accepted=2, num_own=1,
    threshold=0.15,
    credit=0.625, credit_delta=-0.125, expected_accepted=2.5, mean_jsd=0.25, num_scored=3,
    log_likelihood=-1.5, num_greedy=2, regret=0.5, edge_ms=100.0, cloud_ms=60.0, rework_ms=5.0,
    verify_ms=50.0, queue_ms=10.0,
)  # fmt: skip


async def test_telemetry_is_read_as_it_was_added(
    store: Store, redis: Any, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    await store.telemetry.add()
    await store.telemetry.add(WINDOW, SESSION, TIMELINE, REPORT)
    with caplog.at_level(logging.WARNING):
        await redis.xadd(keys.telemetry, {"kind": "window", "number": "x"})
        await redis.xadd(keys.telemetry, {"kind": "future"})
        await redis.xadd(keys.telemetry, {"kind": "timeline", "events": "[[7]"})
        await store.telemetry.add(WINDOW)
        read = await store.telemetry.read()
    assert [entry for _, entry in read] == [WINDOW, SESSION, TIMELINE, REPORT, WINDOW]
    assert caplog.text.count("skipped") == 3
    first = read[0][0]
    assert await store.telemetry.read(after=first, count=1) == read[1:2]
    assert await store.telemetry.read(after=read[-1][0]) == []


async def test_telemetry_fields_are_flat_and_documented(
    store: Store, redis: Any, keys: Keys
) -> None:
    await store.telemetry.add(WINDOW, SESSION)
    (_, window), (_, finished) = await redis.xrange(keys.telemetry)
    assert window.items() >= {b"kind": b"window", b"rollback": b"0", b"rtt_ms": b"3.25"}.items()
    assert finished.items() >= {b"kind": b"session", b"acceptance": b"0.75"}.items()
    assert b"usage" not in finished


async def test_telemetry_is_capped(store: Store, redis: Any, keys: Keys) -> None:
    fill = "for _ = 1, 21000 do redis.call('XADD', KEYS[1], '*', 'kind', 'window') end"
    await redis.eval(fill, 1, keys.telemetry)
    await store.telemetry.add(WINDOW)
    assert await redis.xlen(keys.telemetry) < 20_500
