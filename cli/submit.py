"""`e2sci submit`: queue one prompt or chat and show its answer as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import typer

from bus.client import Chunk, Client
from bus.protocol.errors import RequestFailedError, RequestTimeoutError
from bus.protocol.messages import FinishReason
from bus.protocol.requests import GenerationRequest
from bus.settings import BusSettings
from bus.store import End, Role, Store
from cli.group import say

__all__ = ["follow", "submit", "warn_without_edges"]

CANCEL_WAIT_S = 5.0
"""How long a cancelled request gets to write its end."""

Show = Callable[[str, Chunk], None]
"""Takes (request id, chunk)."""


async def submit(
    settings: BusSettings, request: GenerationRequest, show: Show, timeout_s: float | None
) -> None:
    """Queue the request and show its answer until it ends.

    Raises:
        RequestFailedError: it ended with an error, or somebody else cancelled it.
        RequestTimeoutError: no end in time; the request is cancelled.
    """
    async with Client(settings=settings) as client:
        await warn_without_edges(settings)
        end = await follow(client, request, show, timeout_s)
    if end.finish_reason is FinishReason.ERROR:
        raise RequestFailedError(end.error)
    if end.finish_reason is FinishReason.CANCELLED:
        raise RequestFailedError("the request was cancelled by somebody else")


async def follow(
    client: Client, request: GenerationRequest, show: Show, timeout_s: float | None = None
) -> End:
    """Submit and show; cancelled, late or without a reader, the request is cancelled too."""
    request_id = await client.submit(request.prompt, **_options(request))
    shown = asyncio.create_task(_show_all(client, request_id, show, timeout_s))
    try:
        await asyncio.wait({shown})
        return shown.result()
    except (asyncio.CancelledError, RequestTimeoutError, OSError):
        await client.cancel(request_id)
        await asyncio.wait({shown}, timeout=CANCEL_WAIT_S)
        shown.cancel()
        raise


async def _show_all(client: Client, request_id: str, show: Show, timeout_s: float | None) -> End:
    async for chunk in client.stream(request_id, timeout_s):
        show(request_id, chunk)
        if chunk.end is not None:
            return chunk.end
    raise RequestFailedError(f"request {request_id}: its answer broke off; submit it again")


def show_text(_request_id: str, chunk: Chunk) -> None:
    """The answer's text, as it comes."""
    typer.echo(chunk.text, nl=chunk.end is not None)


def show_json(request_id: str, chunk: Chunk) -> None:
    """One JSON object a line, with the words of the result stream (docs/architecture.md)."""
    entry: dict[str, Any] = {"id": request_id, "kind": "tokens"}
    if chunk.end is None:
        entry |= {
            "start": chunk.start,
            "tokens": chunk.token_ids,
            "text": chunk.text,
            "accepted": [int(flag) for flag in chunk.accepted],
        }
    else:
        entry |= {"kind": "end", **msgspec.to_builtins(chunk.end)}
    typer.echo(msgspec.json.encode(entry))


def _options(request: GenerationRequest) -> dict[str, Any]:
    return request.model_dump(exclude={"id", "prompt"})


async def warn_without_edges(settings: BusSettings) -> None:
    """Say that requests wait where no edge worker is there to take them."""
    store = await Store.connect(settings)
    try:
        if not await store.registry.workers(Role.EDGE):
            say("no edge worker is running; the prompt waits in the queue until one starts")
    finally:
        await store.close()
