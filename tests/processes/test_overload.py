"""More prompts than places, with real processes and the default pair in int8.

`pytest -s -m long tests/processes/test_overload.py` prints the times; they are not asserted.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from bus.client import Client
from bus.settings import BusSettings
from bus.store import FinishReason, Keys, Store
from launch.stack import Stack, StackOptions

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow_model,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

PROMPTS = ("Describe a lighthouse.", "Explain how bread rises.", "Tell me about rivers.")
MAX_NEW_TOKENS = 120
MOST_OPENS = 60
LEASE_S = 2.0
PATIENCE_S = 240.0


@dataclass(frozen=True)
class House:
    """A stack with one place at its cloud worker, and a way to its queue and store."""

    stack: Stack
    client: Client
    store: Store

    async def answer(
        self, prompt: str, disturb: Callable[[str], Awaitable[None]] | None = None
    ) -> Answered:
        """One answer; `disturb` gets the request's id after its first tokens."""
        request_id = await self.client.submit(prompt, max_new_tokens=MAX_NEW_TOKENS)
        return await self.read(request_id, disturb)

    async def read(
        self, request_id: str, disturb: Callable[[str], Awaitable[None]] | None = None
    ) -> Answered:
        """The answer to a request that has been submitted."""
        tokens, disturbed_s, resumed_s = list[int](), 0.0, 0.0
        async with asyncio.timeout(PATIENCE_S):
            async for chunk in self.client.stream(request_id):
                if chunk.end is not None:
                    assert chunk.end.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
                    assert disturb is None, "the answer was over before it could be disturbed"
                    return Answered(tuple(tokens), time.monotonic(), resumed_s - disturbed_s)
                if disturbed_s and not resumed_s:
                    resumed_s = time.monotonic()
                tokens += chunk.token_ids
                if disturb is not None and len(tokens) >= MAX_NEW_TOKENS // 4:
                    await disturb(request_id)
                    disturb, disturbed_s = None, time.monotonic()
        raise AssertionError("no end")

    async def num_refused(self) -> int:
        """Openings that the cloud worker has refused."""
        (cloud,) = await self.store.registry.workers(role="cloud")
        return cloud.counters.get("faults", 0)


@dataclass(frozen=True)
class Answered:
    """An answer; `ended_s` by the monotonic clock, `pause_s` from the disturbance to new text."""

    tokens: tuple[int, ...]
    ended_s: float
    pause_s: float


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house() -> AsyncIterator[House]:
    options = StackOptions(dtype="int8", threads=1, edge=2)
    env = {
        "E2SCI_MAX_SESSIONS": "1", "E2SCI_LEASE_S": str(LEASE_S), "E2SCI_PREFIX_CACHE_MB": "0",
    }  # fmt: skip
    async with (
        Stack(options, log=lambda _: None, env=env) as stack,
        Client(redis_url=stack.redis_url) as client,
    ):
        store = await Store.connect(BusSettings.load(redis_url=stack.redis_url))
        yield House(stack, client, store)
        await store.close()


async def test_three_prompts_for_one_place_are_answered_in_order_with_few_opens(
    house: House,
) -> None:
    alone = [await house.answer(prompt) for prompt in PROMPTS]  # warms up, too
    began_s = time.monotonic()
    alone = [await house.answer(prompt) for prompt in PROMPTS]
    alone_s = time.monotonic() - began_s
    refused = await house.num_refused()

    began_s = time.monotonic()
    ids = [await house.client.submit(p, max_new_tokens=MAX_NEW_TOKENS) for p in PROMPTS]
    together = await asyncio.gather(*map(house.read, ids))
    together_s = time.monotonic() - began_s
    await asyncio.sleep(3.0)  # the heartbeat that brings the counters
    num_opens = await house.num_refused() - refused + len(PROMPTS)
    print(
        f"\n3 prompts of {MAX_NEW_TOKENS} tokens: one after the other {alone_s:.2f} s, at once "
        f"{together_s:.2f} s, ratio {together_s / alone_s:.3f}; {num_opens} opens"
    )
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [a.ended_s for a in together] == sorted(a.ended_s for a in together)
    assert num_opens <= MOST_OPENS


async def test_a_successor_goes_on_at_once_where_the_only_place_is_its_predecessors(
    house: House,
) -> None:
    calm = await house.answer(PROMPTS[0])
    waiting: list[asyncio.Task[Answered]] = []

    async def kill(request_id: str) -> None:
        """Others wait for the place when its edge dies."""
        waiting.extend(asyncio.create_task(house.answer(prompt)) for prompt in PROMPTS[1:])
        await asyncio.sleep(1.0)  # until they have been refused
        async with Redis.from_url(house.stack.redis_url, decode_responses=True) as redis:
            owner = await redis.hget(Keys("e2sci:").request(request_id), "owner")
        os.kill(house.stack.process(str(owner)).pid, signal.SIGKILL)

    disturbed = await house.answer(PROMPTS[0], kill)
    print(f"\nnew text {disturbed.pause_s:.2f} s after the kill; the lease is {LEASE_S} s")
    assert disturbed.tokens == calm.tokens
    for answered in await asyncio.gather(*waiting):
        assert len(answered.tokens) == MAX_NEW_TOKENS or answered.tokens
