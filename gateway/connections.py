"""Connections of clients that are slow, silent or gone: each ends within a set time.

uvicorn closes a connection that is idle between two requests. It waits without end for the rest of
a request that has begun, for the first request of a connection, and for a client that takes nothing
of a response.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["bounded", "close_dead"]

_Base: Any = AutoHTTPProtocol
"""uvicorn's with httptools where that is installed, else with h11."""


def bounded(timeout_s: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which closes a connection whose request's head does not come whole
    within `timeout_s` of the connection's first moment or of the head's first byte. The body is
    bounded where it is read (`gateway.door`)."""

    class Bounded(_Base):  # type: ignore[misc]
        _closing: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()
            elif self._closing is None:
                self._closing = self.loop.call_later(timeout_s, self.transport.close)

        def _unwatch(self) -> None:
            if self._closing is not None:
                self._closing.cancel()
                self._closing = None

    return Bounded


def close_dead(listener: socket.socket, timeout_s: float) -> None:
    """Connections that `listener` accepts end once the other side has acknowledged nothing for
    `timeout_s`, or has no room for what is sent to it, or does not answer while nothing is sent."""
    seconds = max(1, round(timeout_s))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_USER_TIMEOUT", round(1000 * timeout_s)),  # Linux
        ("TCP_KEEPIDLE", seconds),
        ("TCP_KEEPINTVL", max(1, seconds // 4)),
        ("TCP_KEEPCNT", 4),
    ):
        if option := getattr(socket, name, None):
            listener.setsockopt(socket.IPPROTO_TCP, option, value)
