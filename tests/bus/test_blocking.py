"""The store without an event loop: shared by threads, opened again after it was closed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from bus.protocol.errors import StoreUnavailableError
from bus.settings import BusSettings
from bus.store import WorkerRecord
from bus.store.blocking import BlockingStore
from bus.store.registry import Role


def workers(store: BlockingStore) -> list[str]:
    return [record.worker_id for record in store.call(lambda s: s.registry.workers())]


def test_calls_return_values_and_come_from_any_thread(bus_settings: BusSettings) -> None:
    store = BlockingStore(bus_settings)
    record = WorkerRecord(worker_id="edge-1", role=Role.EDGE, boot="1")
    store.call(lambda s: s.registry.beat(record))
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: tuple(workers(store)), range(8))) == {("edge-1",)}
    store.close()


def test_a_closed_store_opens_again(bus_settings: BusSettings) -> None:
    store = BlockingStore(bus_settings)
    store.close()
    assert workers(store) == []
    store.close()
    assert workers(store) == []
    store.close()


def test_errors_reach_the_caller(unused_tcp_port: int) -> None:
    store = BlockingStore(BusSettings(redis_url=f"redis://127.0.0.1:{unused_tcp_port}/0"))
    with pytest.raises(StoreUnavailableError, match="does not answer"):
        workers(store)
    store.close()
