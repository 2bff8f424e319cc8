"""Steps that the tests of the queue share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from bus.protocol.requests import new_request
from bus.store import Claim, End, FinishReason, Store, Usage
from bus.store.keys import Keys

Expire = Callable[[], Awaitable[None]]
Entries = Callable[[str], Awaitable[list[dict[str, str]]]]

NO_WAIT_MS = 1
STOP = End(FinishReason.STOP, usage=Usage(prompt_tokens=3, completion_tokens=2))


async def take(store: Store, edge: str = "edge-1") -> Claim:
    claim = await store.queue.take(edge, NO_WAIT_MS)
    assert claim is not None
    return claim


async def submitted(store: Store, prompt: str = "Hello", **options: Any) -> str:
    return await store.queue.submit(new_request(prompt, **options))


async def request_hash(redis: Any, keys: Keys, request_id: str) -> dict[str, str]:
    stored: dict[bytes, bytes] = await redis.hgetall(keys.request(request_id))
    return {name.decode(): value.decode() for name, value in stored.items()}
