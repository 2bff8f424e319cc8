"""One chat completion over HTTP, streamed, and when each of its pieces came."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

from bus.protocol.errors import E2SCIError

_DATA = "data: "
_DONE = "[DONE]"


class GatewayError(E2SCIError):
    """The gateway has answered with something else than a stream."""


@dataclass
class Streamed:
    """What has come of a stream.

    Attributes:
        request_id: of the queue. at_s: `time.perf_counter` of each piece of text; lengths: of the
            text then, in characters.
        busy: it was refused with 429.
    """

    request_id: str = ""
    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    done: bool = False
    busy: bool = False
    at_s: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def client(url: str) -> httpx2.AsyncClient:
    """For as many streams at once as one likes."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(base_url=url, limits=limits, timeout=None)


async def stream(
    http: httpx2.AsyncClient, prompt: str, max_tokens: int, into: Streamed | None = None,
    **options: Any,
) -> Streamed:  # fmt: skip
    """Ask and read to the end.

    Args:
        into: takes what comes while it comes.
        options: more fields of the request.

    Raises:
        GatewayError: an error other than 429, or an error in the stream.
    """
    body = {
        "model": "default", "messages": [{"role": "user", "content": prompt}], "stream": True,
        "max_tokens": max_tokens, "temperature": 0, "stream_options": {"include_usage": True},
    } | options  # fmt: skip
    got = Streamed() if into is None else into
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code == httpx2.codes.TOO_MANY_REQUESTS:
            got.busy = True
            return got
        if response.status_code != httpx2.codes.OK:
            text = (await response.aread()).decode(errors="replace")
            raise GatewayError(f"HTTP {response.status_code}: {text[:300]}")
        async for event in _events(response):
            _take(got, event)
    got.done = True
    return got


async def _events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """Up to [DONE]; a stream that ends without it is an error."""
    async for line in response.aiter_lines():
        if line == _DATA + _DONE:
            return
        if line.startswith(_DATA):
            yield json.loads(line.removeprefix(_DATA))
    raise GatewayError("the stream ended without [DONE]")


def _take(got: Streamed, event: dict[str, Any]) -> None:
    if "error" in event:
        raise GatewayError(f"in the stream: {event['error']}")
    got.request_id = event["id"].partition("-")[2]
    if event.get("usage"):
        got.num_tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        text = choice["delta"].get("content") or ""
        if text:
            got.text += text
            got.at_s.append(time.perf_counter())
            got.lengths.append(len(got.text))
        got.finish_reason = choice.get("finish_reason") or got.finish_reason
