"""The store for programs without an event loop: calls run on a loop in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from bus.settings import BusSettings
from bus.store import Store

__all__ = ["BlockingStore"]

T = TypeVar("T")


class BlockingStore:
    """One store for all threads of a process. Nothing is started before the first `call`."""

    def __init__(self, settings: BusSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._running: tuple[asyncio.AbstractEventLoop, Store] | None = None

    def call(self, ask: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
        """What `ask(store)` returns, or raises.

            workers = blocking.call(lambda store: store.registry.workers())

        Raises:
            StoreUnavailableError: Redis does not answer.
            ConfigurationError: it refuses our user or password.
        """
        with self._lock:
            if self._running is None:
                self._running = self._start()
            loop, store = self._running
        return asyncio.run_coroutine_threadsafe(ask(store), loop).result()

    def close(self) -> None:
        """Close the connections; a later `call` opens them again."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            loop, store = running
            asyncio.run_coroutine_threadsafe(store.close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    def _start(self) -> tuple[asyncio.AbstractEventLoop, Store]:
        loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(loop,), name="store", daemon=True).start()

        async def make() -> Store:
            return Store(self._settings)

        return loop, asyncio.run_coroutine_threadsafe(make(), loop).result()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()
