"""One answer as its reader gets it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bus.client import Client
from bus.errors import RequestFailedError
from bus.store import Usage
from bus.store.entries import FinishReason


@dataclass(frozen=True, slots=True)
class Answer:
    """All token ids, and what they took."""

    token_ids: tuple[int, ...]
    usage: Usage


async def read_answer(client: Client, prompt: str, **options: Any) -> Answer:
    """Submit a prompt and read its answer; options as in `Client.submit`.

    Raises:
        RequestFailedError: it ended with an error.
    """
    request = await client.submit(prompt, **options)
    tokens: list[int] = []
    async for chunk in client.stream(request):
        if chunk.end is None:
            tokens += chunk.token_ids
            continue
        if chunk.end.finish_reason is FinishReason.ERROR:
            raise RequestFailedError(f"the answer to {prompt[:40]!r}: {chunk.end.error}")
        return Answer(tuple(tokens), chunk.end.usage)
    raise RequestFailedError(f"the answer to {prompt[:40]!r} broke off")
