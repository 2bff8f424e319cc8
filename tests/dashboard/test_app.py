"""The page as a viewer meets it: empty, at work, without Redis, behind a password."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st
from redis.asyncio import Redis
from streamlit.testing.v1 import AppTest

from bus.settings import BusSettings
from bus.store import Keys, Role, Store
from tests.dashboard.conftest import control, ended, run_one_window, window, worker

APP = Path(__file__).parents[2] / "dashboard" / "app.py"


@pytest.fixture
def page(bus_settings: BusSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[AppTest]:
    monkeypatch.setenv("E2SCI_REDIS_URL", bus_settings.redis_url)
    monkeypatch.setenv("E2SCI_KEY_PREFIX", bus_settings.key_prefix)
    monkeypatch.setenv("E2SCI_REFRESH_S", "0.5")
    monkeypatch.delenv("E2SCI_DASHBOARD_PASSWORD", raising=False)
    yield AppTest.from_file(str(APP), default_timeout=60)
    st.cache_resource.clear()


def tile(page: AppTest, label: str) -> str:
    (value,) = [str(metric.value) for metric in page.metric if metric.label.startswith(label)]
    return value


def headings(page: AppTest) -> list[str]:
    return [markdown.value for markdown in page.markdown if markdown.value.startswith("#")]


async def test_empty(page: AppTest) -> None:
    page.run()
    assert not page.exception
    assert not page.error
    (info,) = page.info
    assert "No windows yet" in info.value
    assert "e2sci submit" in info.value
    (warning,) = page.warning
    assert "e2sci up" in warning.value
    assert tile(page, "Acceptance") == "–"
    assert "##### Goodput" not in headings(page)


async def test_at_work(page: AppTest, store: Store) -> None:
    request = (await run_one_window(store)).request_id
    await store.sessions.save(control(request))
    await store.registry.beat(worker("edge-1", capacity=4, load=1))
    await store.registry.beat(worker("cloud-1", Role.CLOUD))
    await store.telemetry.add(ended("before", completion_tokens=64))
    page.run()
    assert not page.exception
    assert not page.info
    assert not page.warning, [w.value for w in page.warning]
    assert tile(page, "Acceptance") == "75 %"
    assert tile(page, "Rolled back") == "100 %"
    assert tile(page, "Sessions running") == "1"
    assert tile(page, "Workers up") == "2 of 2"
    assert len(page.get("plotly_chart")) == 6
    sessions, workers, finished = (table.value for table in page.dataframe)
    assert sessions["request"].tolist() == [request]
    assert sessions["method"].tolist() == ["auto (lossless)"]
    assert workers["worker"].tolist() == ["cloud-1", "edge-1"]
    assert finished["tokens"].tolist() == [64]


@pytest.mark.parametrize("length", ["1 min", "15 min", "1 h"])
async def test_every_time_range_draws(page: AppTest, store: Store, length: str) -> None:
    await run_one_window(store)
    page.run()
    page.segmented_control(key="time_range").set_value(length).run()
    assert not page.exception
    assert len(page.get("plotly_chart")) == 6


async def test_a_quiet_time_range_says_so(
    page: AppTest, redis: Redis, bus_settings: BusSettings
) -> None:
    stream = Keys(bus_settings.key_prefix).telemetry
    ten_minutes_ago = int((time.time() - 600) * 1000)
    await redis.xadd(stream, dict(window("a").to_fields().items()), id=f"{ten_minutes_ago}-0")
    quiet = "No windows in the last 5 min."
    page.run()
    assert not page.info
    assert quiet in [caption.value for caption in page.caption]
    page.segmented_control(key="time_range").set_value("15 min").run()
    assert quiet not in [caption.value for caption in page.caption]


async def test_a_dead_worker_is_named(page: AppTest, store: Store) -> None:
    await store.registry.beat(worker("edge-7"), ttl_s=-1)
    page.run()
    assert any("Down: `edge-7`" in warning.value for warning in page.warning)
    assert tile(page, "Workers up") == "0 of 1"


def test_redis_away(page: AppTest, unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2SCI_REDIS_URL", f"redis://:hunter2@127.0.0.1:{unused_tcp_port}/0")
    page.run()
    assert not page.exception
    (error,) = page.error
    assert "No connection to Redis" in error.value
    assert "recovers by itself" in error.value
    assert "hunter2" not in error.value
    assert not page.metric


def test_a_wrong_setting_is_explained(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2SCI_REDIS_URL", "http://example.org")
    page.run()
    assert not page.exception
    assert "redis_url" in page.error[0].value


def test_the_password_is_asked_for_first(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2SCI_DASHBOARD_PASSWORD", "öffne dich")
    page.run()
    assert not page.metric
    assert not page.warning, [w.value for w in page.warning]

    page.text_input[0].input("open sesame")
    page.button[0].click().run()
    assert page.error[0].value == "That is not the password."
    assert not page.metric

    page.text_input[0].input("öffne dich")
    page.button[0].click().run()
    assert not page.exception
    assert not page.text_input
    assert page.metric

    page.run()  # stays open for this browser session
    assert page.metric


def test_an_empty_password_is_no_way_in(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2SCI_DASHBOARD_PASSWORD", "secret")
    page.run()
    page.button[0].click().run()
    assert page.error
    assert not page.metric
