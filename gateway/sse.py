"""Server-sent events, and the watch over clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["DONE", "KEEP_ALIVE", "ClientGoneError", "EventStream", "event", "or_gone"]

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"
"""A comment: clients skip it, and proxies see that the connection lives."""

_encode = msgspec.json.Encoder().encode


class ClientGoneError(Exception):
    """The client has closed the connection."""


def event(data: Any) -> bytes:
    """One event with JSON data."""
    return b"data: " + _encode(data) + b"\n\n"


async def or_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled once the client has gone.

    Args:
        receive: of the request, whose body has been read.

    Raises:
        ClientGoneError: it has gone.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that sends events as they come and stops at once when the client goes.

    Args:
        events: whole events, as bytes.
        close: called at the end, however it comes.
        gone: called before `close` where the client has gone.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        close: Callable[[], None],
        gone: Callable[[], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._gone = events, close, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await or_gone(receive, self._send(send))
        except ClientGoneError:
            self._gone()
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
