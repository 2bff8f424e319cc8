"""Controllers that end with their test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bus.runtime.metrics import Metrics
from bus.settings import BusSettings
from bus.store import Store
from bus.transport.sockets import Sockets
from controller import server
from controller.server import Controller
from controller.settings import ControllerSettings
from controller.watch import ControllerTally
from decoding.control import Policy
from tests.controller.house import (
    POLICY,
    House,
    Start,
)


@pytest.fixture(autouse=True)
def quick_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REPEAT_S", 0.02)


@pytest.fixture
async def start(bus_settings: BusSettings) -> AsyncIterator[Start]:
    houses: list[House] = []
    stores: list[Store] = []

    async def make(policy: Policy = POLICY, **settings: Any) -> House:
        common = {"redis_url": bus_settings.redis_url, "key_prefix": bus_settings.key_prefix}
        full = ControllerSettings.load(**(common | settings))
        store = await Store.connect(full)
        stores.append(store)
        sockets = Sockets(full)
        tally = ControllerTally(Metrics(), sockets)
        controller = await Controller.start(full, store, sockets, lambda _: policy, tally)
        houses.append(House(controller, store, sockets, "boot"))
        await asyncio.sleep(0)
        return houses[-1]

    yield make
    for house in houses:
        if not all(task.done() for task in house.tasks):
            await house.stop()
    for store in stores:
        await store.close()
