"""Real ZeroMQ on loopback: who hears what, what garbage does, and who is let in."""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import Any

import msgpack
import pytest
import zmq
import zmq.asyncio

import bus.transport.sockets
from bus.protocol.codec import MAX_FRAME_BYTES, AnyMessage, encode
from bus.protocol.errors import MessageTooLargeError
from bus.protocol.messages import CloseSession, Fault, FaultCode, SessionReady
from bus.transport.sockets import (
    EVERYBODY,
    HIGH_WATER_MARK,
    Sockets,
    topic_of,
)
from tests.bus.wire import (
    LOOPBACK,
    close,
    heard,
    strange,
    take,
    until,
)

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
        ready = SessionReady(edge, 0, "cloud", 1)
        assert await heard(partial(publisher.publish, edge, ready), listener) == ready
    for number in range(1, 6):
        publisher.publish("edge-1", SessionReady("edge-1", number, "cloud", 1))
        publisher.publish("edge-10", SessionReady("edge-10", number, "cloud", 1))
    for edge, listener in (("edge-1", edge_1), ("edge-10", edge_10)):
        got: list[AnyMessage] = []
        while SessionReady(edge, 5, "cloud", 1) not in got:
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

    def handle(message: AnyMessage, _size: int) -> None:
        if message != close(0):  # it was published until it was heard, and may come again
            turns.append((turn, message))

    delivering = asyncio.ensure_future(listener.deliver(handle))
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
    monkeypatch.setattr(bus.transport.sockets, "_BURST", 2)
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
