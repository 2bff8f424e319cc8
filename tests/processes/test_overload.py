"""More prompts than places, with real processes and the default pair in int8.

`pytest -s -m long tests/processes/test_overload.py` prints the times; they are not asserted.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
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
        tokens, at_s, disturbing = list[int](), list[float](), None
        async with asyncio.timeout(PATIENCE_S):
            async for chunk in self.client.stream(request_id):
                if chunk.end is not None:
                    assert chunk.end.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
                    break
                tokens += chunk.token_ids
                at_s.append(time.monotonic())
                if disturb is not None and not disturbing and len(tokens) >= MAX_NEW_TOKENS // 4:
                    disturbing = asyncio.ensure_future(disturb(request_id))
        if disturbing is not None:
            assert disturbing.done(), "the answer was over before it could be disturbed"
            await disturbing
        gaps_s = [after - before for before, after in itertools.pairwise(at_s)]
        return Answered(tuple(tokens), time.monotonic(), max(gaps_s, default=0.0))

    async def taken(self, request_id: str) -> str:
        """The edge worker that has taken a request, once there is one."""
        async with Redis.from_url(self.stack.redis_url, decode_responses=True) as redis:
            async with asyncio.timeout(PATIENCE_S):
                owner_of = Keys("e2sci:").request(request_id)
                while not (owner := await redis.hget(owner_of, "owner")):  # noqa: ASYNC110 - a key has no event
                    await asyncio.sleep(0.02)
        return str(owner)

    async def num_refused(self) -> int:
        """Openings that the cloud worker has refused."""
        (cloud,) = await self.store.registry.workers(role="cloud")
        return cloud.counters.get("faults", 0)


@dataclass(frozen=True)
class Answered:
    """An answer; `ended_s` by the monotonic clock, `pause_s` the longest time without new text."""

    tokens: tuple[int, ...]
    ended_s: float
    pause_s: float


Start = Callable[[int], Awaitable[House]]


@pytest_asyncio.fixture
async def start() -> AsyncIterator[Start]:
    """Starts a stack with so many edge workers."""
    async with AsyncExitStack() as exits:

        async def make(num_edges: int) -> House:
            options = StackOptions(dtype="int8", threads=1, edge=num_edges)
            env = {
                "E2SCI_MAX_SESSIONS": "1", "E2SCI_LEASE_S": str(LEASE_S),
                "E2SCI_PREFIX_CACHE_MB": "0",
            }  # fmt: skip
            stack = await exits.enter_async_context(Stack(options, log=lambda _: None, env=env))
            client = await exits.enter_async_context(Client(redis_url=stack.redis_url))
            store = await Store.connect(BusSettings.load(redis_url=stack.redis_url))
            exits.push_async_callback(store.close)
            return House(stack, client, store)

        yield make


@pytest.mark.parametrize("num_edges", [1, 2])
async def test_three_prompts_for_one_place_are_answered_in_order_with_few_opens(
    start: Start, num_edges: int
) -> None:
    house = await start(num_edges)
    alone = [await house.answer(prompt) for prompt in PROMPTS]  # warms up, too
    began_s = time.monotonic()
    alone = [await house.answer(prompt) for prompt in PROMPTS]
    alone_s = time.monotonic() - began_s
    refused = await house.num_refused()

    began_s = time.monotonic()
    reading = list[asyncio.Task[Answered]]()
    for prompt in PROMPTS:
        request_id = await house.client.submit(prompt, max_new_tokens=MAX_NEW_TOKENS)
        reading.append(asyncio.create_task(house.read(request_id)))
        await house.taken(request_id)
        await asyncio.sleep(0.5)  # its edge asks for the place before the next one's edge does
    together = await asyncio.gather(*reading)
    together_s = time.monotonic() - began_s
    await asyncio.sleep(3.0)  # the heartbeat that brings the counters
    num_opens = await house.num_refused() - refused + len(PROMPTS)
    print(
        f"\n{num_edges} edges, 3 prompts of {MAX_NEW_TOKENS} tokens: one after the other "
        f"{alone_s:.2f} s, at once {together_s:.2f} s, "
        f"ratio {together_s / alone_s:.3f}; {num_opens} opens"
    )
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [a.ended_s for a in together] == sorted(a.ended_s for a in together)
    assert num_opens <= MOST_OPENS


async def test_a_successor_goes_on_at_once_where_the_only_place_is_its_predecessors(
    start: Start,
) -> None:
    house = await start(2)
    calm = await house.answer(PROMPTS[0])
    waiting: list[asyncio.Task[Answered]] = []

    async def kill(request_id: str) -> None:
        """Others wait for the place when its edge dies."""
        waiting.extend(asyncio.create_task(house.answer(prompt)) for prompt in PROMPTS[1:])
        await asyncio.sleep(0.5)  # until they have been refused
        os.kill(house.stack.process(await house.taken(request_id)).pid, signal.SIGKILL)

    disturbed = await house.answer(PROMPTS[0], kill)
    print(
        f"\nlongest pause {disturbed.pause_s:.2f} s, undisturbed {calm.pause_s:.2f} s; "
        f"the lease is {LEASE_S} s"
    )
    assert disturbed.tokens == calm.tokens
    for answered in await asyncio.gather(*waiting):
        assert answered.tokens
