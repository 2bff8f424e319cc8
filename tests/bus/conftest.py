"""Helpers of the bus tests: a second store, leases that have run out, a line that loses replies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from bus.settings import BusSettings
from bus.store import Store
from bus.store.keys import GROUP, Keys
from bus.transport.sockets import Sockets
from tests.bus.wire import MakeSockets


@pytest.fixture
def keys(key_prefix: str) -> Keys:
    return Keys(key_prefix)


@pytest.fixture
async def impatient(bus_settings: BusSettings) -> AsyncIterator[Store]:
    """A store on the same keys whose leases run out after 50 ms."""
    store = await Store.connect(bus_settings.model_copy(update={"lease_s": 0.05}))
    yield store
    await store.close()


@pytest.fixture
def expire_leases(redis: Any, keys: Keys) -> Callable[[], Awaitable[None]]:
    """Make every lease look a minute old, without waiting for a minute."""

    async def expire() -> None:
        for entry in await redis.xpending_range(keys.prompts, GROUP, "-", "+", 100):
            await redis.xclaim(
                keys.prompts,
                GROUP,
                entry["consumer"],
                0,
                [entry["message_id"]],
                idle=60_000,
                justid=True,
            )

    return expire


class LossyLine:
    """A TCP proxy before Redis that, when told so, carries a command out but loses the reply."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._server: asyncio.Server | None = None
        self.lose_next_reply = False
        self.num_lost = 0

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def close(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(*self._upstream)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                if source is up_reader and self.lose_next_reply:
                    self.lose_next_reply = False
                    self.num_lost += 1
                    break
                sink.write(data)
                await sink.drain()

        directions = [
            asyncio.ensure_future(pump(reader, up_writer)),
            asyncio.ensure_future(pump(up_reader, writer)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in directions:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await task
            for end in (writer, up_writer):
                end.close()


@pytest.fixture
async def lossy(bus_settings: BusSettings) -> AsyncIterator[tuple[LossyLine, Store]]:
    """A line and a store whose connections run over it."""
    parts = urlsplit(bus_settings.redis_url)
    assert parts.hostname is not None
    assert parts.port is not None
    line = LossyLine(parts.hostname, parts.port)
    url = f"redis://127.0.0.1:{await line.start()}/0"
    store = await Store.connect(bus_settings.model_copy(update={"redis_url": url}))
    yield line, store
    await store.close()
    line.close()


@pytest.fixture
def entries_of(redis: Any) -> Callable[[str], Awaitable[list[dict[str, str]]]]:
    """The entries of a stream as a stranger sees them."""

    async def read(key: str) -> list[dict[str, str]]:
        raw: Any = await redis.xrange(key)
        return [
            {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
            for _, fields in raw
        ]

    return read


@pytest.fixture
async def make_sockets() -> AsyncIterator[MakeSockets]:
    made: list[Sockets] = []

    def make(**settings: object) -> Sockets:
        made.append(Sockets(BusSettings.load(**settings)))
        return made[-1]

    yield make
    for sockets in made:
        sockets.close()


@pytest.fixture
def sockets(make_sockets: MakeSockets) -> Sockets:
    return make_sockets()
