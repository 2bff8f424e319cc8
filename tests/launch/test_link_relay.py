"""The link over real TCP and real ZeroMQ. Delays are held to their lower bound alone, which no
busy machine can break; how late the link is, `e2sci bench link` measures."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import pytest
import zmq

from bus.protocol.messages import CloseSession
from bus.settings import BusSettings
from bus.transport.sockets import Inbox, Listener, Sockets
from launch.link import streams
from launch.link.profiles import Conditions, Trace, find_link
from launch.link.relay import Relay
from tests.arrivals import take

HOST = "127.0.0.1"
PATIENCE_S = 60.0
"""Only a failing test waits this long."""

T = TypeVar("T")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
MakeRelay = Callable[[Trace], Relay]


@pytest.fixture
async def make_relay() -> AsyncIterator[MakeRelay]:
    made: list[Relay] = []

    def make(trace: Trace) -> Relay:
        made.append(Relay(trace, seed=1))
        return made[-1]

    yield make
    for relay in made:
        relay.close()


class Server:
    """A server behind a relay that keeps its connections, newest last."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[Streams] = asyncio.Queue()
        self._server: asyncio.Server | None = None
        self.address = (HOST, 0)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._take, *self.address)
        self.address = self._server.sockets[0].getsockname()[:2]

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.connections.put((reader, writer))

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.start()
    yield server
    server.stop()


async def dial(relay: Relay, server: Server) -> tuple[Streams, Streams]:
    """Both ends of a connection through the relay."""
    client = await asyncio.open_connection(*relay.listen((HOST, 0), server.address))
    return client, await soon(server.connections.get())


def soon(waiting: Awaitable[T]) -> Awaitable[T]:
    return asyncio.wait_for(waiting, PATIENCE_S)


async def hang_up(*ends: Streams) -> None:
    for _, writer in ends:
        writer.close()


async def pour(writer: asyncio.StreamWriter, data: bytes, chunks: random.Random) -> None:
    """Write `data` in chunks of random size, then end."""
    start = 0
    while start < len(data):
        stop = start + chunks.choice([1, 7, 1459, 1460, 1461, 70_000])
        writer.write(data[start:stop])
        await writer.drain()
        await asyncio.sleep(0)
        start = stop
    writer.write_eof()


async def test_bytes_pass_unchanged_both_ways_however_they_are_cut(
    make_relay: MakeRelay, server: Server
) -> None:
    rough = Conditions(1.0, jitter_ms=0.5, mbps=400.0, loss=0.001)
    near, far = await dial(make_relay(Trace([(0.0, rough)])), server)
    up, down = os.urandom(700_000), os.urandom(500_000)
    _, _, got_up, got_down = await soon(
        asyncio.gather(
            pour(near[1], up, random.Random(1)),
            pour(far[1], down, random.Random(2)),
            far[0].read(),
            near[0].read(),
        )
    )
    assert got_up == up
    assert got_down == down
    await hang_up(near, far)


async def test_nothing_is_early(make_relay: MakeRelay, server: Server) -> None:
    relay = make_relay(find_link("30ms"))
    began = time.monotonic()
    near, far = await dial(relay, server)
    assert time.monotonic() - began >= 0.045  # SYN, its answer, ACK
    for _ in range(3):
        began = time.monotonic()
        near[1].write(b"there")
        assert await soon(far[0].readexactly(5)) == b"there"
        assert time.monotonic() - began >= 0.015
        far[1].write(b"back")
        assert await soon(near[0].readexactly(4)) == b"back"
        assert time.monotonic() - began >= 0.030
    await hang_up(near, far)
    report = relay.report(realtime=False)
    assert (report.connections, report.bytes_up, report.bytes_down) == (1, 15, 12)
    assert report.late_median_ms is not None
    assert report.late_max_ms is not None
    assert 0 <= report.late_median_ms <= report.late_max_ms


async def test_the_delay_follows_the_trace_from_the_first_connection_on(
    make_relay: MakeRelay, server: Server
) -> None:
    slow = Trace([(0.0, Conditions(0.0)), (0.2, Conditions(60.0))])
    near, far = await dial(make_relay(slow), server)
    await asyncio.sleep(0.2)
    began = time.monotonic()
    near[1].write(b"x")
    await soon(far[0].readexactly(1))
    assert time.monotonic() - began >= 0.060
    await hang_up(near, far)


async def test_one_side_may_end_and_still_listen(make_relay: MakeRelay, server: Server) -> None:
    near, far = await dial(make_relay(find_link("2ms")), server)
    near[1].write(b"question")
    near[1].write_eof()
    assert await soon(far[0].read()) == b"question"
    far[1].write(b"answer")
    far[1].close()
    assert await soon(near[0].read()) == b"answer"
    await hang_up(near)


async def test_a_client_learns_a_way_later_that_nobody_listens(
    make_relay: MakeRelay, server: Server
) -> None:
    server.stop()
    relay = make_relay(find_link("20ms"))
    reader, writer = await asyncio.open_connection(*relay.listen((HOST, 0), server.address))
    began = time.monotonic()
    assert await soon(_read_to_end(reader)) == b""
    assert time.monotonic() - began >= 0.035  # all but the time since the connection
    writer.close()


async def _read_to_end(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


async def test_a_reset_reaches_the_other_side(make_relay: MakeRelay, server: Server) -> None:
    near, far = await dial(make_relay(find_link("2ms")), server)
    far[1].transport.abort()
    assert await soon(_read_to_end(near[0])) == b""
    await hang_up(near)


async def test_a_sender_has_to_wait_when_much_is_held(
    make_relay: MakeRelay, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_HELD_BYTES", 2**16)
    relay = make_relay(find_link("1ms"))
    near, far = await dial(relay, server)
    busy: Any = far[1].transport
    busy.pause_reading()
    data = os.urandom(2**24)
    near[1].write(data)
    near[1].write_eof()
    passed = 0
    while not passed or passed != relay.report(False).bytes_up:  # until nothing moves any more
        passed = relay.report(False).bytes_up
        await asyncio.sleep(0.1)
    assert passed < len(data)
    kept_by_client: Any = near[1].transport
    assert kept_by_client.get_write_buffer_size() > 0
    busy.resume_reading()
    assert await soon(far[0].read()) == data
    await hang_up(near, far)


# --- ZeroMQ -----------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["plain", "curve"])
def keys(request: pytest.FixtureRequest) -> dict[str, str]:
    if not request.param:
        return {}
    public, secret = zmq.curve_keypair()
    return {"curve_public_key": public.decode(), "curve_secret_key": secret.decode()}


def through(relay: Relay, endpoint: str) -> str:
    """The endpoint in front of `endpoint`."""
    port = int(endpoint.rpartition(":")[2])
    return "tcp://{}:{}".format(*relay.listen((HOST, 0), (HOST, port)))


async def first(source: Inbox | Listener) -> object:
    ((message, _),) = await take(source, 1)
    return message


async def test_push_and_pull_pub_and_sub_talk_through_it_with_and_without_curve(
    make_relay: MakeRelay, keys: dict[str, str]
) -> None:
    relay = make_relay(find_link("5g"))
    cloud, edge = Sockets(BusSettings.load(**keys)), Sockets(BusSettings.load(**keys))
    try:
        inbox, publisher = cloud.inbox("tcp://127.0.0.1:*"), cloud.publisher("tcp://127.0.0.1:*")
        outbox = edge.outbox(through(relay, inbox.endpoint))
        listener = edge.listener(through(relay, publisher.endpoint), "edge-1")
        sent = [CloseSession(f"s{n}", n, "x" * 200) for n in range(20)]
        for message in sent:
            outbox.send(message)
        assert [await soon(first(inbox)) for _ in sent] == sent
        heard = asyncio.ensure_future(soon(first(listener)))
        while not heard.done():  # what is published before the subscription has arrived is lost
            publisher.publish("edge-1", sent[0])
            await asyncio.sleep(0.02)
        assert await heard == sent[0]
    finally:
        cloud.close()
        edge.close()


async def test_a_cloud_that_comes_back_is_reached_again(make_relay: MakeRelay) -> None:
    relay = make_relay(find_link("2ms"))
    edge, cloud = Sockets(BusSettings.load()), Sockets(BusSettings.load())
    try:
        inbox = cloud.inbox("tcp://127.0.0.1:*")
        endpoint = inbox.endpoint
        outbox = edge.outbox(through(relay, endpoint))
        outbox.send(CloseSession("before", 1, ""))
        assert await soon(first(inbox)) == CloseSession("before", 1, "")
        cloud.close()
        cloud = Sockets(BusSettings.load())
        inbox = cloud.inbox(endpoint)
        again = asyncio.ensure_future(soon(first(inbox)))
        while not again.done():  # what was sent into the dead connection may be lost
            outbox.send(CloseSession("after", 1, ""))
            await asyncio.sleep(0.02)
        assert await again == CloseSession("after", 1, "")
        assert relay.report(False).connections >= 2
    finally:
        cloud.close()
        edge.close()
