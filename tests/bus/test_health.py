"""The container health check against a real registry."""

from __future__ import annotations

import os
import subprocess
import sys

from bus.runtime.health import is_alive
from bus.runtime.worker import WorkerSettings, new_record
from bus.settings import BusSettings
from bus.store import Role, Store


def _settings(bus_settings: BusSettings, worker_id: str = "") -> WorkerSettings:
    return WorkerSettings(
        redis_url=bus_settings.redis_url, key_prefix=bus_settings.key_prefix, worker_id=worker_id
    )


async def test_a_heartbeat_of_this_host_is_healthy_in_any_role(
    store: Store, bus_settings: BusSettings
) -> None:
    settings = _settings(bus_settings)
    for role in Role:
        record = new_record(settings, role)
        await store.registry.beat(record)
        assert await is_alive(settings)
        await store.registry.remove(record.worker_id, record.boot)
        assert not await is_alive(settings)


async def test_an_expired_heartbeat_is_unhealthy(store: Store, bus_settings: BusSettings) -> None:
    settings = _settings(bus_settings)
    await store.registry.beat(new_record(settings, Role.EDGE), ttl_s=-1)
    assert not await is_alive(settings)


async def test_a_worker_elsewhere_does_not_make_this_one_healthy(
    store: Store, bus_settings: BusSettings
) -> None:
    await store.registry.beat(new_record(_settings(bus_settings, "other"), Role.EDGE))
    assert not await is_alive(_settings(bus_settings))
    assert not await is_alive(_settings(bus_settings, "mine"))


async def test_the_command_exits_0_only_with_a_live_worker(
    store: Store, bus_settings: BusSettings
) -> None:
    settings = _settings(bus_settings, "mine")
    assert "no live heartbeat" in _check(settings, expected_status=1)
    await store.registry.beat(new_record(settings, Role.CLOUD), ttl_s=600)
    assert _check(settings, expected_status=0) == ""


async def test_the_command_says_that_redis_is_away(bus_settings: BusSettings) -> None:
    nobody = bus_settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    assert "unhealthy" in _check(_settings(nobody), expected_status=1)


def _check(settings: WorkerSettings, expected_status: int) -> str:
    """Standard error of the health check under `settings`."""
    done = subprocess.run(
        [sys.executable, "-m", "bus.runtime.health"],
        env={
            **os.environ,
            "E2SCI_REDIS_URL": settings.redis_url,
            "E2SCI_KEY_PREFIX": settings.key_prefix,
            "E2SCI_WORKER_ID": settings.worker_id,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == expected_status, done.stderr
    return done.stderr
