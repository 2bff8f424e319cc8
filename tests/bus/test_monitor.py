"""`/metrics` and `/health` over HTTP, and what makes a worker ready."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from bus.protocol.errors import ConfigurationError
from bus.runtime import metrics
from bus.runtime import monitor as module
from bus.runtime.monitor import Monitor
from bus.runtime.worker import WorkerSettings, new_record
from bus.settings import BusSettings
from bus.store import Store

PATIENCE_S = 20.0


def get(monitor: Monitor, path: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(monitor.url.replace("/metrics", path), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def health(monitor: Monitor, path: str = "/health") -> tuple[int, dict[str, Any]]:
    status, body = await asyncio.to_thread(get, monitor, path)
    return status, json.loads(body)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - nothing notifies of a note
            await asyncio.sleep(0.01)


@pytest.fixture
async def monitor() -> Any:
    made = Monitor(port=0)
    yield made
    made.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_EVERY_S", 0.01)
    monkeypatch.setattr(metrics, "LAG_EVERY_S", 0.01)


async def test_metrics_are_served(monitor: Monitor) -> None:
    monitor.metrics.gauge("level", "A level.", lambda: 3)
    status, body = await asyncio.to_thread(get, monitor, "/metrics")
    assert status == 200
    assert "e2sci:level 3.0" in body.splitlines()


async def test_a_scrape_is_answered_while_the_event_loop_is_busy(monitor: Monitor) -> None:
    """From this coroutine itself, which holds the loop meanwhile."""
    assert get(monitor, "/metrics")[0] == 200


async def test_other_pages_are_named(monitor: Monitor) -> None:
    status, body = await asyncio.to_thread(get, monitor, "/")
    assert status == 404
    assert "/metrics" in body


async def test_a_worker_that_starts_is_live_and_not_ready(monitor: Monitor) -> None:
    status, report = await health(monitor)
    assert (status, report["live"], report["ready"]) == (503, True, False)
    assert report["reasons"] == ["the worker is starting"]
    assert (await health(monitor, "/health/live"))[0] == 200
    assert (await health(monitor, "/health/ready"))[0] == 503


async def test_a_loop_that_stands_still_is_not_live(
    monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STUCK_S", -1.0)
    status, report = await health(monitor, "/health/live")
    assert (status, report["live"], report["ready"]) == (503, False, False)
    assert "event loop" in report["reasons"][-1]


@pytest.mark.usefixtures("quick")
async def test_a_worker_is_ready_once_redis_answers_and_its_check_passes(
    monitor: Monitor, bus_settings: BusSettings
) -> None:
    store = await Store.connect(bus_settings)
    seen: list[int] = []

    def check(workers: Any) -> str:
        seen.append(len(workers))
        return "" if workers else "no workers are here"

    monitor.follow(store, check)
    await until(lambda: bool(seen))
    assert await health(monitor) == (
        503, {"live": True, "ready": False, "reasons": ["no workers are here"]},
    )  # fmt: skip
    settings = WorkerSettings.load(redis_url=bus_settings.redis_url, worker_id="w1")
    await store.registry.beat(new_record(settings, "cloud"))
    await until(lambda: 1 in seen)
    assert await health(monitor) == (200, {"live": True, "ready": True, "reasons": []})
    await store.close()


@pytest.mark.usefixtures("quick")
async def test_a_worker_without_redis_is_not_ready(monitor: Monitor) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        store = Store(BusSettings.load(redis_url=f"redis://127.0.0.1:{taken.getsockname()[1]}/0"))
        monitor.follow(store, lambda _: "")
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status, report = await health(monitor)
                if "has not answered yet" not in report["reasons"][0]:
                    break
                await asyncio.sleep(0.01)
        assert status == 503
        assert "redis_url" in report["reasons"][0]
        await store.close()


@pytest.mark.usefixtures("quick")
async def test_a_check_that_raises_is_a_reason(monitor: Monitor, bus_settings: BusSettings) -> None:
    store = await Store.connect(bus_settings)
    monitor.follow(store, lambda _: str(1 / 0))
    await until(lambda: any("division" in r for r in monitor.health.report()["reasons"]))
    await store.close()


async def test_lag_is_measured(monitor: Monitor, quick: None) -> None:
    await until(lambda: monitor._lag_s.count >= 2)
    assert monitor._lag_s.sum >= 0


async def test_a_port_in_use_is_a_wrong_setting(monitor: Monitor) -> None:
    port = int(monitor.url.split(":")[2].split("/")[0])
    with pytest.raises(ConfigurationError, match=f"metrics: cannot listen on 127.0.0.1:{port}"):
        Monitor(port=port)


async def test_without_a_port_nothing_listens(bus_settings: BusSettings) -> None:
    silent = Monitor()
    store = await Store.connect(bus_settings)
    silent.follow(store, lambda _: "never asked")
    assert silent.url == ""
    assert not silent._tasks
    assert silent.health.report()["ready"]
    silent.close()
    await store.close()


def test_the_url_is_that_at_which_others_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr("bus.runtime.worker.Monitor", lambda *args: made.append(args))
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    for settings in (
        {},
        {"metrics_port": 0},
        {"metrics_port": 9464, "metrics_host": "0.0.0.0"},
        {"metrics_port": 9464, "metrics_host": "0.0.0.0", "advertise_host": "10.0.0.5"},
    ):
        WorkerSettings.load(**settings).monitor("edge")
    assert [args[:3] for args in made] == [
        ("127.0.0.1", None, ""), ("127.0.0.1", 0, "127.0.0.1"), ("0.0.0.0", 9464, "127.0.0.1"),
        ("0.0.0.0", 9464, "10.0.0.5"),
    ]  # fmt: skip


def test_an_empty_port_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2SCI_METRICS_PORT", "")
    assert WorkerSettings.load().metrics_port is None
    monkeypatch.setenv("E2SCI_METRICS_PORT", "9464")
    assert WorkerSettings.load().metrics_port == 9464
