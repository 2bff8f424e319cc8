"""Taking a few messages from a socket that delivers for ever."""

from __future__ import annotations

import contextlib

from bus.protocol.codec import AnyMessage
from bus.transport.sockets import Inbox, Listener


class _EnoughError(Exception):
    pass


async def take(source: Inbox | Listener, count: int) -> list[tuple[AnyMessage, int]]:
    """The next `count` messages with the sizes of their frames; later ones stay in the socket."""
    got: list[tuple[AnyMessage, int]] = []

    def handle(message: AnyMessage, size: int) -> None:
        got.append((message, size))
        if len(got) == count:
            raise _EnoughError

    def enough(_message: AnyMessage, error: Exception) -> None:
        raise error

    with contextlib.suppress(_EnoughError):
        await source.deliver(handle, enough)
    return got
