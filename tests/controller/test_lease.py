"""One controller in charge at a time, on a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from bus.settings import BusSettings
from bus.store import Store
from controller.lease import Lease, LeaseLostError


@pytest.fixture
async def store(bus_settings: BusSettings) -> AsyncIterator[Store]:
    store = await Store.connect(bus_settings)
    yield store
    await store.close()


async def test_the_second_waits_until_the_first_gives_back(store: Store) -> None:
    first, second = Lease(store, "a", 30.0), Lease(store, "b", 30.0)
    await first.acquire()
    await first.acquire()  # one's own is renewed
    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await second.release()  # not its own: nothing happens
    assert not await store.sessions.hold_lease("b", 30.0)
    await first.release()
    await asyncio.wait_for(waiting, 10)


async def test_the_second_takes_over_from_one_that_is_silent(store: Store) -> None:
    await Lease(store, "a", 0.1).acquire()
    await asyncio.wait_for(Lease(store, "b", 30.0).acquire(), 10)
    with pytest.raises(LeaseLostError, match="another controller has taken over"):
        await asyncio.wait_for(Lease(store, "a", 0.1).keep_forever(), 10)


async def test_one_that_renews_keeps_it(store: Store) -> None:
    lease = Lease(store, "a", 0.3)
    await lease.acquire()
    keeping = asyncio.create_task(lease.keep_forever())
    for _ in range(10):
        await asyncio.sleep(0.05)
        assert not await store.sessions.hold_lease("b", 0.3)
    keeping.cancel()


async def test_a_redis_that_has_forgotten_gives_it_to_the_holder_again(store: Store) -> None:
    lease = Lease(store, "a", 0.3)
    await lease.acquire()
    keeping = asyncio.create_task(lease.keep_forever())
    await store.sessions.release_lease("a")
    await asyncio.sleep(0.2)
    assert not await store.sessions.hold_lease("b", 0.3)
    keeping.cancel()
