"""One answer as its reader sees it: how many tokens, in which time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from bus.client import Client
from bus.errors import RequestFailedError
from bus.store import Usage
from bus.store.entries import FinishReason


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """What a reader got.

    Attributes:
        token_ids: of the whole answer.
        tokens: how many came after the first piece. seconds: from the first piece to the last.
    """

    token_ids: tuple[int, ...]
    tokens: int
    seconds: float
    usage: Usage


async def timed_answer(client: Client, prompt: str, **options: Any) -> TimedAnswer:
    """Submit a prompt and read its answer; options as in `Client.submit`.

    Raises:
        RequestFailedError: it ended with an error.
    """
    request = await client.submit(prompt, **options)
    arrivals: list[tuple[float, tuple[int, ...]]] = []
    async for chunk in client.stream(request):
        if chunk.end is None:
            arrivals.append((time.perf_counter(), chunk.token_ids))
            continue
        if chunk.end.finish_reason is FinishReason.ERROR:
            raise RequestFailedError(f"the answer to {prompt[:40]!r}: {chunk.end.error}")
        times = [at for at, _ in arrivals]
        tokens = [token for _, piece in arrivals for token in piece]
        return TimedAnswer(
            tuple(tokens),
            len(tokens) - len(arrivals[0][1]) if arrivals else 0,
            times[-1] - times[0] if arrivals else 0.0,
            chunk.end.usage,
        )
    raise RequestFailedError(f"the answer to {prompt[:40]!r} broke off")
