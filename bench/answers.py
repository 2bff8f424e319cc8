"""One answer as its reader gets it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from bus.client import Client
from bus.protocol.errors import RequestFailedError
from bus.protocol.requests import session_id
from bus.store import Usage
from bus.store.entries import FinishReason


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """What came, when, and what it took.

    Attributes:
        came_s: when each piece came, and ended_s when the end did, in seconds from the submission.
    """

    token_ids: tuple[int, ...]
    usage: Usage
    session: str = ""
    text: str = ""
    came_s: tuple[float, ...] = ()
    ended_s: float = 0.0


async def read_answer(client: Client, prompt: str, **options: Any) -> TimedAnswer:
    """Submit a prompt and read its answer; options as in `Client.submit`.

    Raises:
        RequestFailedError: it ended with an error.
    """
    began = time.perf_counter()
    request = await client.submit(prompt, **options)
    tokens: list[int] = []
    text, came = "", []
    async for chunk in client.stream(request):
        now = time.perf_counter() - began
        if chunk.end is None:
            tokens += chunk.token_ids
            text += chunk.text
            came.append(now)
            continue
        if chunk.end.finish_reason is FinishReason.ERROR:
            raise RequestFailedError(f"the answer to {prompt[:40]!r}: {chunk.end.error}")
        return TimedAnswer(
            tuple(tokens), chunk.end.usage, session_id(request), text, tuple(came), now
        )
    raise RequestFailedError(f"the answer to {prompt[:40]!r} broke off")
