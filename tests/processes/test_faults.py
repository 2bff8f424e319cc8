"""kill -9 of any worker in the middle of an answer: the answer completes, token for token.

Real processes, real sockets, a real Valkey, tiny models. What is checked is what a client reads
from the result stream: pieces follow each other without gap or overlap, and the tokens are those
of an answer nobody disturbed.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import psutil
import pytest

from bus.client import Client
from bus.settings import BusSettings
from bus.store import FinishReason, Store, TokensEntry
from launch.stack import Stack

pytestmark = pytest.mark.slow

StartStack = Callable[..., Awaitable[Stack]]
REQUEST = {"max_new_tokens": 200, "temperature": 0.8, "seed": 1, "raw": True}
PROMPT = "the cat sat on the mat and"


async def read_answer(
    client: Client, disturb: Callable[[], Awaitable[None]] | None = None, after_tokens: int = 40
) -> tuple[int, ...]:
    """One answer's tokens; `disturb` runs once that many have come."""
    request_id = await client.submit(PROMPT, **REQUEST)
    tokens: list[int] = []
    async with asyncio.timeout(60):
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


def kill(stack: Stack, name: str) -> Callable[[], Awaitable[None]]:
    async def disturb() -> None:
        os.kill(stack.process(name).pid, signal.SIGKILL)

    return disturb


@pytest.mark.parametrize("victim", ["edge-1", "cloud-1", "controller"])
async def test_killed_in_mid_answer(start_stack: StartStack, victim: str) -> None:
    stack = await start_stack()
    async with Client(redis_url=stack.redis_url) as client:
        calm = await read_answer(client)
        assert len(calm) > 60
        assert await read_answer(client, kill(stack, victim)) == calm
        assert await read_answer(client) == calm, "the restarted worker serves as before"


async def test_the_other_edge_takes_over_and_a_paused_one_cannot_write(
    start_stack: StartStack,
) -> None:
    stack = await start_stack(edge=2)
    store = await Store.connect(BusSettings.load(redis_url=stack.redis_url))
    async with Client(redis_url=stack.redis_url) as client:
        calm = await read_answer(client)
        paused: list[int] = []

        async def pause_owner() -> None:
            for record in await store.registry.workers(role="edge"):
                if record.load:
                    paused.append(stack.process(record.worker_id).pid)
                    os.kill(paused[0], signal.SIGSTOP)

        assert await read_answer(client, pause_owner) == calm
        assert paused
        os.kill(paused[0], signal.SIGCONT)
        await _until(lambda: _lost_leases(store))
        assert psutil.pid_exists(paused[0]), "it lives on"
    entries = await _stream_tokens(store)
    assert entries == len(calm), "nothing was added after the end"
    await store.close()


async def _stream_tokens(store: Store) -> int:
    """Tokens in the newest result stream, read raw."""
    keys = await store._connection.scan("e2sci:result:*")
    newest = 0, 0
    for key in keys:
        request_id = key.decode().rpartition(":")[2]
        entries = [entry async for entry in store.results.read(request_id)]
        at = max(int(entry.entry_id.partition("-")[0]) for entry in entries)
        count = sum(len(entry.tokens) for entry in entries if isinstance(entry, TokensEntry))
        newest = max(newest, (at, count))
    return newest[1]


async def _lost_leases(store: Store) -> bool:
    records = await store.registry.workers(role="edge")
    return any(record.counters.get("lost_leases") for record in records)


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - what changes is in another process
            await asyncio.sleep(0.1)


async def test_redis_vanishes_for_a_while(start_stack: StartStack) -> None:
    """The edge keeps what it could not write, and goes on."""
    stack = await start_stack()
    async with Client(redis_url=stack.redis_url) as client:
        calm = await read_answer(client)

        async def pause_redis() -> None:
            pid = stack.process("valkey").pid
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(1.5)
            os.kill(pid, signal.SIGCONT)

        assert await read_answer(client, pause_redis) == calm
