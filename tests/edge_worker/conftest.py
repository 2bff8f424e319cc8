"""An edge worker that ends with its test, having given back what it took."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from bus.settings import BusSettings
from bus.store import Store
from tests.edge_worker.shell import House


@pytest.fixture
async def house(store: Store, bus_settings: BusSettings) -> AsyncIterator[House]:
    house = House(store, bus_settings)
    yield house
    await house.stop()
    assert house.sockets.counters["impossible_events"] == 0
    assert house.drafter.open_caches == 0, "every cache is given back"
