"""Sockets, peers and patience for the tests of the transport."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import zmq
import zmq.asyncio

from bus.protocol.codec import AnyMessage, encode
from bus.protocol.messages import CloseSession
from bus.transport.sockets import (
    Inbox,
    Listener,
    Sockets,
)
from tests import arrivals

LOOPBACK = "tcp://127.0.0.1:*"
PATIENCE_S = 20.0
"""Only a failing test waits this long."""

T = TypeVar("T")
MakeSockets = Callable[..., Sockets]


def close(number: int) -> CloseSession:
    return CloseSession("s1", number, "done")


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
