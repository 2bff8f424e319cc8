"""Real ZeroMQ on loopback: who hears what, what garbage does, and who is let in."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import msgpack
import pytest
import zmq
import zmq.asyncio

import bus.sockets
from bus.codec import MAX_FRAME_BYTES, AnyMessage, encode
from bus.errors import ConfigurationError, InsecureBindError, MessageTooLargeError
from bus.messages import CloseSession, Fault, FaultCode, SessionReady
from bus.settings import BusSettings
from bus.sockets import (
    EVERYBODY,
    HIGH_WATER_MARK,
    Inbox,
    Listener,
    Sockets,
    advertised,
    is_loopback,
    topic_of,
)
from tests import arrivals

LOOPBACK = "tcp://127.0.0.1:*"
PATIENCE_S = 20.0
"""Only a failing test waits this long."""

T = TypeVar("T")
MakeSockets = Callable[..., Sockets]


def close(number: int) -> CloseSession:
    return CloseSession("s1", number, "done")


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


@contextmanager
def strange(kind: int) -> Iterator[zmq.asyncio.Socket]:
    """A socket of somebody else's program."""
    with zmq.asyncio.Context() as context, context.socket(kind) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        yield socket


def soon(waiting: Awaitable[T]) -> Awaitable[T]:
    return asyncio.wait_for(waiting, PATIENCE_S)


async def take(source: Inbox | Listener, count: int) -> list[AnyMessage]:
    got = await soon(arrivals.take(source, count))
    assert all(size == len(encode(message)) for message, size in got)
    return [message for message, _ in got]


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():  # noqa: ASYNC110 - counters notify nobody
            await asyncio.sleep(0.005)

    await soon(wait())


async def heard(publish: Callable[[], object], listener: Listener) -> AnyMessage:
    """Publish until a subscriber hears it: PUB drops for late ones."""
    hearing = asyncio.ensure_future(take(listener, 1))
    try:
        while not hearing.done():
            publish()
            await asyncio.sleep(0.01)
        return hearing.result()[0]
    finally:
        hearing.cancel()


# --- delivery ---------------------------------------------------------------------------------


async def test_many_outboxes_reach_one_inbox_in_their_order(sockets: Sockets) -> None:
    inbox = sockets.inbox(LOOPBACK)
    one, other = sockets.outbox(inbox.endpoint), sockets.outbox(inbox.endpoint)
    for number in range(50):
        assert one.send(close(number)) == len(encode(close(number)))
        other.send(close(1000 + number))
    numbers = [m.incarnation for m in await take(inbox, 100) if isinstance(m, CloseSession)]
    assert [n for n in numbers if n < 1000] == list(range(50))
    assert [n for n in numbers if n >= 1000] == list(range(1000, 1050))


async def test_messages_wait_for_a_peer_that_is_not_up_yet(sockets: Sockets) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    sockets.outbox(endpoint).send(close(7))
    assert await take(sockets.inbox(endpoint), 1) == [close(7)]


async def test_an_edge_hears_its_own_topic_and_not_one_that_begins_like_it(
    sockets: Sockets,
) -> None:
    publisher = sockets.publisher(LOOPBACK)
    edge_1 = sockets.listener(publisher.endpoint, "edge-1")
    edge_10 = sockets.listener(publisher.endpoint, "edge-10")
    for edge, listener in (("edge-1", edge_1), ("edge-10", edge_10)):
        ready = SessionReady(edge, 0, "cloud")
        assert await heard(partial(publisher.publish, edge, ready), listener) == ready
    for number in range(1, 6):
        publisher.publish("edge-1", SessionReady("edge-1", number, "cloud"))
        publisher.publish("edge-10", SessionReady("edge-10", number, "cloud"))
    for edge, listener in (("edge-1", edge_1), ("edge-10", edge_10)):
        got: list[AnyMessage] = []
        while SessionReady(edge, 5, "cloud") not in got:
            got += await take(listener, 1)
        assert {message.session for message in got if isinstance(message, SessionReady)} == {edge}


async def test_everybody_hears_the_topic_for_everybody(sockets: Sockets) -> None:
    publisher = sockets.publisher(LOOPBACK)
    fault = Fault("-", FaultCode.BAD_FRAME, "why")
    for edge in ("edge-1", "edge-2"):
        listener = sockets.listener(publisher.endpoint, edge)
        assert await heard(lambda: publisher.publish(EVERYBODY, fault), listener) == fault


def test_topics_end_in_a_slash() -> None:
    assert topic_of("edge-1") == b"edge-1/"
    assert not topic_of("edge-10").startswith(topic_of("edge-1"))


# --- sends that cannot be delivered -----------------------------------------------------------


async def test_without_a_peer_sends_return_and_the_surplus_is_counted(sockets: Sockets) -> None:
    with socket.socket() as deaf:  # bound, and does not listen
        deaf.bind(("127.0.0.1", 0))
        outbox = sockets.outbox(f"tcp://127.0.0.1:{deaf.getsockname()[1]}")
        for number in range(HIGH_WATER_MARK + 30):
            outbox.send(close(number))
    assert sockets.counters["dropped_sends"] == 30


async def test_what_is_published_together_is_handled_together(sockets: Sockets) -> None:
    """All of it before the loop turns to anything else, a bad frame among it or not."""
    publisher = sockets.publisher(LOOPBACK)
    listener = sockets.listener(publisher.endpoint, "edge-1")
    await heard(lambda: publisher.publish("edge-1", close(0)), listener)
    turns: list[tuple[int, Any]] = []
    turn = 0
    delivering = asyncio.ensure_future(listener.deliver(lambda m, _: turns.append((turn, m))))
    await asyncio.sleep(0)
    publisher.publish("edge-1", close(1), close(2), close(3))
    while len(turns) < 3:
        turn += 1
        await asyncio.sleep(0)
    assert [message for _, message in turns] == [close(1), close(2), close(3)]
    assert len({at for at, _ in turns}) == 1
    publisher._send([b"edge-1/", b"nonsense", encode(close(4))])
    while len(turns) < 4:  # noqa: ASYNC110 - nothing here can set an event
        await asyncio.sleep(0)
    assert turns[-1][1] == close(4)
    assert sockets.counters["bad_frames"] == 1
    delivering.cancel()


async def test_publishing_to_nobody_is_no_drop(sockets: Sockets) -> None:
    publisher = sockets.publisher(LOOPBACK)
    for _ in range(2 * HIGH_WATER_MARK):
        publisher.publish("edge-1", close(1))
    assert sockets.counters["dropped_sends"] == 0


async def test_a_send_to_a_peer_that_was_given_up_is_counted(sockets: Sockets) -> None:
    """Sessions share a peer; one may have closed it while another still holds it."""
    inbox = sockets.inbox(LOOPBACK)
    outbox, publisher = sockets.outbox(inbox.endpoint), sockets.publisher(LOOPBACK)
    outbox.close()
    publisher.close()
    outbox.send(close(1))
    publisher.publish("edge-1", close(1))
    assert sockets.counters["dropped_sends"] == 2


async def test_an_oversize_message_is_the_senders_error(sockets: Sockets) -> None:
    inbox = sockets.inbox(LOOPBACK)
    outbox = sockets.outbox(inbox.endpoint)
    with pytest.raises(MessageTooLargeError):
        outbox.send(CloseSession("s1", 1, "x" * (MAX_FRAME_BYTES + 1)))
    outbox.send(close(2))
    assert await take(inbox, 1) == [close(2)]


# --- garbage ----------------------------------------------------------------------------------

GARBAGE = [
    b"",
    b"\xff" * 100,
    b"\x91" * 1000,  # deep enough to break repr()
    b"\x91" * 100_000,
    msgpack.packb([1, 3, "s1", 1, "done"]),
    msgpack.packb([2, 99]),
    msgpack.packb([2, 3, "s1", "one", "done"]),
    msgpack.packb({"version": 1}),
]


async def test_garbage_is_counted_and_the_inbox_lives_on(sockets: Sockets) -> None:
    inbox = sockets.inbox(LOOPBACK)
    with strange(zmq.PUSH) as stranger:
        stranger.connect(inbox.endpoint)
        for frame in GARBAGE:
            await stranger.send(frame)
        await stranger.send_multipart([b"two", b"parts"])
        await stranger.send(encode(close(5)))
        assert await take(inbox, 1) == [close(5)]
    assert sockets.counters["bad_frames"] == len(GARBAGE) + 1


async def test_a_flood_does_not_shut_out_the_event_loop(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus.sockets, "_BURST", 2)
    inbox = sockets.inbox(LOOPBACK)
    order: list[AnyMessage | None] = []
    outbox = sockets.outbox(inbox.endpoint)
    for number in range(5):
        outbox.send(close(number))
    await asyncio.sleep(0.2)  # all five are in the socket before the first is taken

    def handle(message: AnyMessage, _size: int) -> None:
        order.append(message)
        asyncio.get_running_loop().call_soon(order.append, None)

    delivering = asyncio.ensure_future(inbox.deliver(handle))
    await until(lambda: len(order) == 10)
    delivering.cancel()
    assert order[:3] == [close(0), close(1), None]


async def test_what_a_handler_raises_costs_that_message_only(
    sockets: Sockets, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = sockets.inbox(LOOPBACK)
    outbox = sockets.outbox(inbox.endpoint)
    for number in range(3):
        outbox.send(close(number))
    handled: list[AnyMessage] = []
    failed: list[tuple[AnyMessage, str]] = []

    def handle(message: AnyMessage, _size: int) -> None:
        if message == close(1):
            raise LookupError("nobody")
        handled.append(message)

    delivering = asyncio.ensure_future(
        inbox.deliver(handle, lambda message, error: failed.append((message, str(error))))
    )
    await until(lambda: len(handled) == 2)
    assert handled == [close(0), close(2)]
    assert failed == [(close(1), "nobody")]
    assert sockets.counters["failed_messages"] == 1
    assert "CloseSession could not be handled" in caplog.text
    delivering.cancel()


async def test_without_anybody_to_tell_delivery_goes_on_too(sockets: Sockets) -> None:
    inbox = sockets.inbox(LOOPBACK)
    outbox = sockets.outbox(inbox.endpoint)
    outbox.send(close(1))
    outbox.send(close(2))

    def handle(_message: AnyMessage, _size: int) -> None:
        raise LookupError("nobody")

    delivering = asyncio.ensure_future(inbox.deliver(handle))
    await until(lambda: sockets.counters["failed_messages"] == 2)
    assert not delivering.done()
    delivering.cancel()


async def test_garbage_is_counted_and_the_listener_lives_on(sockets: Sockets) -> None:
    with strange(zmq.PUB) as stranger:
        port = stranger.bind_to_random_port("tcp://127.0.0.1")
        listener = sockets.listener(f"tcp://127.0.0.1:{port}", "edge-1")
        hearing = asyncio.ensure_future(take(listener, 1))
        while not hearing.done():
            for frame in GARBAGE:
                await stranger.send_multipart([b"edge-1/", frame])
            if sockets.counters["bad_frames"] >= 2 * len(GARBAGE):
                await stranger.send_multipart([b"edge-1/", encode(close(5))])
            await asyncio.sleep(0.01)
        assert await hearing == [close(5)]


async def test_a_frame_over_the_limit_costs_its_sender_the_connection_only(
    sockets: Sockets,
) -> None:
    inbox = sockets.inbox(LOOPBACK)
    honest = sockets.outbox(inbox.endpoint)
    with strange(zmq.PUSH) as stranger:
        stranger.connect(inbox.endpoint)
        await stranger.send(encode(close(1)))
        assert await take(inbox, 1) == [close(1)]
        await stranger.send(bytes(MAX_FRAME_BYTES + 1))
        await until(lambda: sockets.counters["disconnects"] > 0)
        honest.send(close(2))
        assert await take(inbox, 1) == [close(2)]
        await stranger.send(encode(close(3)))  # libzmq has connected again
        assert await take(inbox, 1) == [close(3)]
    assert sockets.counters["bad_frames"] == 0


async def test_a_stranger_that_speaks_no_zeromq_does_no_harm(sockets: Sockets) -> None:
    inbox = sockets.inbox(LOOPBACK)
    host, port = inbox.endpoint.removeprefix("tcp://").split(":")
    for greeting in (b"GET / HTTP/1.1\r\n\r\n" * 10, bytes(200), b"\xff" * 200):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(greeting)
        await writer.drain()
        writer.close()
    sockets.outbox(inbox.endpoint).send(close(5))
    assert await take(inbox, 1) == [close(5)]


# --- CURVE ------------------------------------------------------------------------------------


def keys() -> dict[str, str]:
    public, secret = zmq.curve_keypair()
    return {"curve_public_key": public.decode(), "curve_secret_key": secret.decode()}


async def test_holders_of_the_key_pair_talk(make_sockets: MakeSockets) -> None:
    pair = keys()
    server, client = make_sockets(**pair), make_sockets(**pair)
    inbox, publisher = server.inbox(LOOPBACK), server.publisher(LOOPBACK)
    client.outbox(inbox.endpoint).send(close(5))
    assert await take(inbox, 1) == [close(5)]
    listener = client.listener(publisher.endpoint, "edge-1")
    assert await heard(lambda: publisher.publish("edge-1", close(6)), listener) == close(6)


async def test_a_peer_that_is_silent_for_longer_than_a_heartbeat_ends_nobody(
    make_sockets: MakeSockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CURVE, libzmq reports such a peer as input although there is nothing to receive."""
    monkeypatch.setattr(bus.sockets, "HEARTBEAT_MS", 50)
    pair = keys()
    inbox = make_sockets(**pair).inbox(LOOPBACK)
    outbox = make_sockets(**pair).outbox(inbox.endpoint)
    waiting = asyncio.ensure_future(take(inbox, 1))
    await asyncio.sleep(0.5)
    outbox.send(close(8))
    assert await waiting == [close(8)]


async def refused_on(server: Sockets, endpoint: str, client: Sockets) -> Counter[str]:
    """Send from `client`, wait until libzmq has told it what it thinks of that."""
    outbox = client.outbox(endpoint)
    monitor: Any = outbox._socket.get_monitor_socket(
        zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_DISCONNECTED
    )
    outbox.send(close(666))
    event = int.from_bytes((await soon(monitor.recv_multipart()))[0][:2], "little")
    assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
    return server.counters


@pytest.mark.parametrize("kind", ["other keys", "no keys", "right server key only"])
async def test_nobody_else_is_let_in(make_sockets: MakeSockets, kind: str) -> None:
    pair = keys()
    server, honest = make_sockets(**pair), make_sockets(**pair)
    inbox = server.inbox(LOOPBACK)
    if kind == "right server key only":
        with strange(zmq.PUSH) as stranger:
            public, secret = zmq.curve_keypair()
            stranger.curve_serverkey = pair["curve_public_key"].encode()
            stranger.curve_publickey, stranger.curve_secretkey = public, secret
            monitor = stranger.get_monitor_socket(
                zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_SUCCEEDED
            )
            stranger.connect(inbox.endpoint)
            event = int.from_bytes((await soon(monitor.recv_multipart()))[0][:2], "little")
            assert event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            stranger.disable_monitor()
    else:
        stranger_sockets = make_sockets(**(keys() if kind == "other keys" else {}))
        await refused_on(server, inbox.endpoint, stranger_sockets)
    honest.outbox(inbox.endpoint).send(close(5))
    assert await take(inbox, 1) == [close(5)]


async def test_a_listener_without_keys_hears_nothing(make_sockets: MakeSockets) -> None:
    pair = keys()
    server, honest, stranger = make_sockets(**pair), make_sockets(**pair), make_sockets()
    publisher = server.publisher(LOOPBACK)
    eavesdropper = stranger.listener(publisher.endpoint, "edge-1")
    listener = honest.listener(publisher.endpoint, "edge-1")
    stolen = asyncio.ensure_future(take(eavesdropper, 1))
    for number in range(20):
        await heard(partial(publisher.publish, "edge-1", close(number)), listener)
    assert not stolen.done()
    stolen.cancel()


# --- binding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://[::]:*"])
async def test_beyond_loopback_only_with_keys_or_leave(
    make_sockets: MakeSockets, endpoint: str
) -> None:
    bare = make_sockets()
    for bind in (bare.inbox, bare.publisher):
        with pytest.raises(InsecureBindError, match="E2SCI_INSECURE=1"):
            bind(endpoint)
    if "::" not in endpoint:  # the machine may have no IPv6
        make_sockets(insecure=True).inbox(endpoint)
        make_sockets(**keys()).publisher(endpoint)


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.9.9.9:*", True),
        ("tcp://[::1]:5555", True),
        ("tcp://localhost:5555", True),
        ("ipc:///tmp/socket", True),
        ("inproc://name", True),
        ("tcp://0.0.0.0:5555", False),
        ("tcp://*:5555", False),
        ("tcp://[::]:5555", False),
        ("tcp://10.0.0.7:5555", False),
        ("tcp://localhost.evil.org:5555", False),
        ("tcp://eth0:5555", False),
        ("udp://127.0.0.1:5555", False),
    ],
)
def test_what_counts_as_loopback(endpoint: str, expected: bool) -> None:
    assert is_loopback(endpoint) is expected


async def test_an_address_in_use_and_nonsense_are_configuration_errors(sockets: Sockets) -> None:
    inbox = sockets.inbox(LOOPBACK)
    with pytest.raises(ConfigurationError, match="cannot listen on"):
        sockets.inbox(inbox.endpoint)
    for endpoint in ("tcp://127.0.0.1:port", "nonsense"):
        with pytest.raises(ConfigurationError, match="cannot connect to"):
            sockets.outbox(endpoint)
        with pytest.raises(ConfigurationError, match="cannot connect to"):
            sockets.listener(endpoint, "edge-1")


def test_others_reach_the_bound_port_under_the_advertised_host() -> None:
    assert advertised("tcp://0.0.0.0:5555", "cloud.lan") == "tcp://cloud.lan:5555"
    assert advertised("tcp://[::]:5555", "10.0.0.7") == "tcp://10.0.0.7:5555"
    assert advertised("tcp://127.0.0.1:5555", "127.0.0.1", 6666) == "tcp://127.0.0.1:6666"


async def test_the_real_port_is_known(sockets: Sockets) -> None:
    for endpoint in (sockets.inbox(LOOPBACK).endpoint, sockets.publisher(LOOPBACK).endpoint):
        assert int(endpoint.rpartition(":")[2]) > 0
