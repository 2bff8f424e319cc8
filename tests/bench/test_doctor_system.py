"""`e2sci doctor` about Redis and the workers in it: a real Valkey, records of the test's own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from bench.doctor import system
from bench.doctor.checks import Check, Status
from bus.protocol.errors import StoreUnavailableError
from bus.protocol.requests import new_request
from bus.settings import BusSettings
from bus.store import QueueState, Role, Store, WindowEntry, WorkerRecord

OK, WARNING, FAILED, SKIPPED = Status.OK, Status.WARNING, Status.FAILED, Status.SKIPPED
CLOUD = WorkerRecord(
    worker_id="cloud-1", role=Role.CLOUD, boot="a", model="big", tokenizer_digest="t",
    probe_digest="p", vocab_size=100, capacity=4,
)  # fmt: skip
EDGE = WorkerRecord(
    worker_id="edge-1", role=Role.EDGE, boot="b", model="small", tokenizer_digest="t",
    vocab_size=100,
)  # fmt: skip
CONTROLLER = WorkerRecord(worker_id="controller", role=Role.CONTROLLER, boot="c")
WINDOW = WindowEntry(
    at_ms=0, request="r", session="s", client="c", edge="edge-1", cloud="cloud-1", method="sd",
    incarnation=1, number=1, outcome="accepted", num_drafted=4, num_accepted=4, num_committed=5,
    rollback=False, threshold=0.0, window=4, credit=0.5, draft_ms=8.0, verify_ms=20.0,
    queue_ms=0.0, rtt_ms=1.0, bytes_up=100, bytes_down=100,
)  # fmt: skip
GOOD: dict[str, Any] = {
    "redis_version": "7.2.4", "role": "master", "cluster_enabled": 0, "aof_enabled": 1,
    "aof_last_write_status": "ok", "maxmemory": 0, "maxmemory_policy": "noeviction",
    "used_memory": 10**6,
}  # fmt: skip


def worst(checks: Sequence[Check]) -> Status:
    found = {check.status for check in checks}
    return next(status for status in (FAILED, WARNING, SKIPPED, OK) if status in found)


def sentences(checks: Sequence[Check]) -> str:
    return " ".join(check.sentence for check in checks)


# --- Redis ------------------------------------------------------------------------------------


async def test_a_redis_that_is_down_fails_with_its_address() -> None:
    with pytest.raises(StoreUnavailableError) as error:
        await system.read_system(BusSettings.load(redis_url="redis://:pw@127.0.0.1:1/0"))
    check = system.unreachable(error.value)
    assert check.status is FAILED
    assert "127.0.0.1:1/0" in check.sentence
    assert "pw" not in check.sentence


async def test_the_shared_valkey_is_read(store: Store, bus_settings: BusSettings) -> None:
    found = await system.read_system(bus_settings)
    checks = system.check_redis(found.info, found.latency_ms)
    assert worst(checks) is not FAILED
    assert "Valkey" in sentences(checks)
    assert found.latency_ms > 0
    assert abs(found.skew_s) < 1.0
    assert found.live == []


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, OK, "Redis 7.2.4 answers in 0.20 ms (measured)"),
        ({"redis_version": "6.2.14"}, FAILED, "version 6.2.14"),
        ({"redis_version": "10.0.0"}, OK, "Redis 10.0.0"),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, OK, "Valkey 9.1.2"),
        ({"cluster_enabled": 1}, FAILED, "is a cluster"),
        ({"role": "slave"}, FAILED, "is a replica"),
        ({"maxmemory_policy": "allkeys-lru"}, WARNING, "evicts keys"),
        ({"maxmemory_policy": "allkeys-lru", "maxmemory": 10**9}, FAILED, "evicts keys"),
        ({"maxmemory": 1_100_000}, WARNING, "uses 1 of 1 MB"),
        ({"aof_enabled": 0}, WARNING, "no append-only file"),
        ({"aof_last_write_status": "err"}, FAILED, "could not write"),
    ],
)
def test_answers_of_info(changes: dict[str, Any], status: Status, words: str) -> None:
    checks = system.check_redis(GOOD | changes, latency_ms=0.2)
    assert worst(checks) is status
    assert words in sentences(checks)


def test_a_slow_redis_is_a_warning() -> None:
    checks = system.check_redis(GOOD, latency_ms=30.0)
    assert worst(checks) is WARNING
    assert "30.0 ms" in sentences(checks)


# --- queue ------------------------------------------------------------------------------------


async def test_a_backlog_without_an_edge_fails(store: Store, bus_settings: BusSettings) -> None:
    await store.queue.submit(new_request("waits"))
    found = await system.read_system(bus_settings)
    checks = system.check_queue(found.overview.queue, found.has_group, False, most=100)
    assert worst(checks) is FAILED
    assert "1 requests wait" in sentences(checks)
    await store.queue.ensure_group()
    found = await system.read_system(bus_settings)
    assert found.has_group
    assert worst(system.check_queue(found.overview.queue, True, True, most=100)) is OK
    assert worst(system.check_queue(found.overview.queue, True, True, most=1)) is WARNING


def test_dead_letters_and_a_missing_group() -> None:
    dead = system.check_queue(QueueState(given_up=3), True, True, most=100)
    assert worst(dead) is WARNING
    assert "3 requests were given up" in sentences(dead)
    assert worst(system.check_queue(QueueState(), False, True, most=100)) is FAILED
    assert worst(system.check_queue(QueueState(), False, False, most=100)) is OK


# --- clocks -----------------------------------------------------------------------------------


async def test_clocks_that_differ_are_named(store: Store, bus_settings: BusSettings) -> None:
    found = await system.read_system(bus_settings)
    (fine,) = system.check_clocks(found)
    assert fine.status is OK
    (early,) = system.check_clocks(msgspec.structs.replace(found, skew_s=-7.0))
    assert early.status is WARNING
    assert "clock of this machine is 7.0 s ahead of" in early.sentence


async def test_the_clock_of_an_edge_shows_in_its_telemetry(
    store: Store, bus_settings: BusSettings
) -> None:
    at_ms = int(1e3 * (time.time() - 60.0))
    await store.telemetry.add(*[msgspec.structs.replace(WINDOW, at_ms=at_ms)] * 6)
    (check,) = system.check_clocks(await system.read_system(bus_settings))
    assert check.status is WARNING
    assert "edge worker edge-1 is 60.0 s slower than" in check.sentence


async def test_a_worker_that_started_in_the_future_is_named(
    store: Store, bus_settings: BusSettings
) -> None:
    await store.registry.beat(msgspec.structs.replace(CLOUD, started_at=time.time() + 100))
    (check,) = system.check_clocks(await system.read_system(bus_settings))
    assert "cloud worker cloud-1" in check.sentence


# --- workers ----------------------------------------------------------------------------------


async def workers(
    store: Store, bus_settings: BusSettings, *records: WorkerRecord, ttl_s: float = 5.0
) -> list[Check]:
    for record in records:
        await store.registry.beat(record, ttl_s)
    return system.check_workers(await system.read_system(bus_settings))


async def test_a_whole_system_is_fine(store: Store, bus_settings: BusSettings) -> None:
    checks = await workers(store, bus_settings, CLOUD, EDGE, CONTROLLER)
    assert worst(checks) is OK
    assert "edge-1 fits cloud-1" in sentences(checks)


async def test_without_workers_there_is_nothing_to_examine(
    store: Store, bus_settings: BusSettings
) -> None:
    assert worst(await workers(store, bus_settings)) is SKIPPED


@pytest.mark.parametrize(
    ("records", "status", "words"),
    [
        ((CLOUD, CONTROLLER), FAILED, "No edge worker"),
        ((EDGE, CONTROLLER), FAILED, "No cloud worker is registered"),
        ((CLOUD, EDGE), WARNING, "No controller"),
        (
            (msgspec.structs.replace(CLOUD, tokenizer_digest="u"), EDGE, CONTROLLER),
            FAILED,
            "No cloud worker shares the tokenizer of edge-1",
        ),
        (
            (msgspec.structs.replace(CLOUD, vocab_size=200), EDGE, CONTROLLER),
            FAILED,
            "edge-1 knows 100 tokens",
        ),
        (
            (msgspec.structs.replace(CLOUD, load=4), EDGE, CONTROLLER),
            WARNING,
            "it is full: 4 sessions",
        ),
        (
            (
                CLOUD,
                msgspec.structs.replace(CLOUD, worker_id="cloud-2", probe_digest="q"),
                EDGE,
                CONTROLLER,
            ),
            WARNING,
            "compute different bits",
        ),
    ],
)
async def test_systems_that_do_not_fit(
    store: Store, bus_settings: BusSettings, records: tuple[WorkerRecord, ...], status: Status,
    words: str,
) -> None:  # fmt: skip
    checks = await workers(store, bus_settings, *records)
    assert worst(checks) is status
    assert words in sentences(checks)


async def test_a_heartbeat_that_is_late_or_has_ended(
    store: Store, bus_settings: BusSettings
) -> None:
    late = await workers(store, bus_settings, CLOUD, EDGE, CONTROLLER, ttl_s=1.0)
    assert worst(late) is WARNING
    assert "it beats every second" in sentences(late)
    ended = await workers(store, bus_settings, CLOUD, EDGE, CONTROLLER, ttl_s=-1.0)
    assert "No heartbeat for 5 s from" in sentences(ended)
    assert "No worker is registered" in sentences(ended)


async def test_a_record_of_another_release_fails(
    store: Store, bus_settings: BusSettings, redis: Any
) -> None:
    await redis.hset(f"{bus_settings.key_prefix}workers", "old", b'{"id": "old"}')
    checks = await workers(store, bus_settings, CLOUD, EDGE, CONTROLLER)
    assert worst(checks) is FAILED
    assert "1 records are of another release" in sentences(checks)
    assert await redis.hexists(f"{bus_settings.key_prefix}workers", "old")  # nothing is changed
