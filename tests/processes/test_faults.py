"""kill -9 of any worker in the middle of an answer: the answer completes, token for token.

Real processes, real sockets, a real Valkey, tiny models. What is checked is what a client reads
from the result stream: pieces follow each other without gap or overlap, and the tokens are those
of an answer nobody disturbed.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import psutil
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from bus.client import Client
from bus.settings import BusSettings
from bus.store import FinishReason, Keys, Store, TokensEntry
from launch.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PROMPT = "the cat sat on the mat and"
LAST_REQUEST = [""]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def store(stack: Stack) -> AsyncIterator[Store]:
    store = await Store.connect(BusSettings.load(redis_url=stack.redis_url))
    yield store
    await store.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stack: Stack) -> AsyncIterator[Client]:
    async with Client(redis_url=stack.redis_url) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def calm(client: Client) -> tuple[int, ...]:
    """The answer when nobody disturbs it."""
    tokens = await read_answer(client)
    assert len(tokens) > 100
    return tokens


async def read_answer(
    client: Client, disturb: Callable[[], Awaitable[None]] | None = None, after_tokens: int = 40
) -> tuple[int, ...]:
    """One answer's tokens; `disturb` runs once that many have come."""
    request_id = await client.submit(PROMPT, max_new_tokens=200, temperature=0.8, seed=1, raw=True)
    LAST_REQUEST[0] = request_id
    tokens: list[int] = []
    async with asyncio.timeout(120):
        async for chunk in client.stream(request_id):
            if chunk.end is not None:
                assert chunk.end.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
                break
            assert chunk.start == len(tokens), "pieces follow each other"
            tokens += chunk.token_ids
            if disturb is not None and len(tokens) >= after_tokens:
                await disturb()
                disturb = None
    assert disturb is None, "the answer was over before it could be disturbed"
    return tuple(tokens)


async def owner(stack: Stack) -> str:
    """The edge that answers the last request; a heartbeat would tell up to a second late."""
    async with Redis.from_url(stack.redis_url, decode_responses=True) as redis:
        return str(await redis.hget(Keys("e2sci:").request(LAST_REQUEST[0]), "owner"))


async def all_ready(stack: Stack, store: Store) -> None:
    async def complete() -> bool:
        live = {record.worker_id for record in await store.registry.workers()}
        return live >= set(stack.worker_names)

    await until(complete)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(90):
        while not await condition():  # noqa: ASYNC110 - what changes is in another process
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    "victim",
    [
        "cloud-1",
        pytest.param("controller", marks=pytest.mark.long),
        pytest.param("edge", marks=pytest.mark.long),
    ],
)
async def test_killed_in_mid_answer(
    stack: Stack, store: Store, client: Client, calm: tuple[int, ...], victim: str
) -> None:
    async def kill() -> None:
        name = await owner(stack) if victim == "edge" else victim
        os.kill(stack.process(name).pid, signal.SIGKILL)

    assert await read_answer(client, kill) == calm
    await all_ready(stack, store)
    assert await read_answer(client) == calm, "the restarted worker serves as before"


async def test_a_paused_edge_that_comes_back_cannot_write(
    stack: Stack, store: Store, client: Client, calm: tuple[int, ...]
) -> None:
    await all_ready(stack, store)
    paused = 0

    async def pause_owner() -> None:
        nonlocal paused
        paused = stack.process(await owner(stack)).pid
        os.kill(paused, signal.SIGSTOP)

    async def lost_lease() -> bool:
        records = await store.registry.workers(role="edge")
        return any(record.counters.get("lost_leases") for record in records)

    assert await read_answer(client, pause_owner) == calm
    os.kill(paused, signal.SIGCONT)
    await until(lost_lease)
    assert psutil.pid_exists(paused), "it lives on"
    entries = [e async for e in store.results.read(LAST_REQUEST[0])]
    written = [token for e in entries if isinstance(e, TokensEntry) for token in e.tokens]
    assert tuple(written) == calm, "nothing was added, doubled or lost"


async def test_redis_silent_for_a_while(
    stack: Stack, client: Client, calm: tuple[int, ...]
) -> None:
    """The edge keeps what it could not write, and goes on."""

    async def pause_redis() -> None:
        pid = stack.process("valkey").pid
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(1.5)
        os.kill(pid, signal.SIGCONT)

    assert await read_answer(client, pause_redis) == calm
