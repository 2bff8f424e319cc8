"""PipeSpec on real processes with tiny models: kill -9 and SIGSTOP of each stage in the middle of
an answer change no token.

What is checked is what a client reads, as in `test_faults`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from bus.client import Client
from bus.settings import BusSettings
from bus.store import FinishReason, Keys, Role, Store, Usage
from launch.stack import Stack, StackOptions
from tests.processes.conftest import LEASE_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.asyncio(loop_scope="module"),
]

PROMPT = "the cat sat on the mat and"
PAUSE_S = 1.5
PASS_MS, STEP_MS = "30", "2"
"""Of the tiny target and middle model, so that the middle is ahead on a busy machine too."""
Disturb = Callable[[str], Awaitable[None]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chain(tiny_pair: tuple[Path, Path]) -> AsyncIterator[Stack]:
    """One worker of each stage but two edges; the middle model is the draft, edges have none."""
    target, draft = tiny_pair
    options = StackOptions(
        target=str(target), draft=str(draft), dtype="float32", threads=1, edge=2, middle=1,
        drafter="none",
    )  # fmt: skip
    env = {
        "E2SCI_LEASE_S": str(LEASE_S), "OMP_NUM_THREADS": "1",
        "E2SCI_LEAST_PASS_MS": PASS_MS, "E2SCI_LEAST_STEP_MS": STEP_MS,
    }  # fmt: skip
    async with Stack(options, log=lambda _: None, env=env) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(chain: Stack) -> AsyncIterator[Client]:
    async with Client(redis_url=chain.redis_url) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def calm(client: Client) -> tuple[int, ...]:
    """What the target writes by itself."""
    tokens, _ = await read_answer(client, method="auto")
    assert len(tokens) == 100
    return tokens


async def read_answer(
    client: Client, disturb: Disturb | None = None, method: str = "pipespec"
) -> tuple[tuple[int, ...], Usage]:
    """One answer's tokens and usage; `disturb` runs with the request's id after 30 tokens."""
    request_id = await client.submit(
        PROMPT, method=method, max_new_tokens=100, temperature=0.8, seed=1, raw=True
    )
    tokens: list[int] = []
    async with asyncio.timeout(120):
        async for chunk in client.stream(request_id):
            tokens += chunk.token_ids
            if disturb is not None and len(tokens) >= 30:
                await disturb(request_id)
                disturb = None
            if chunk.end is not None:
                assert chunk.end.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
                assert disturb is None, "the answer was over before it could be disturbed"
                return tuple(tokens), chunk.end.usage
    raise AssertionError("no end")


async def all_ready(chain: Stack) -> None:
    store = await Store.connect(BusSettings.load(redis_url=chain.redis_url))
    try:
        async with asyncio.timeout(90):
            while True:
                live = {record.worker_id for record in await store.registry.workers()}
                if live >= set(chain.worker_names):
                    return
                await asyncio.sleep(0.1)
    finally:
        await store.close()


async def test_a_middle_worker_is_a_role_of_its_own_and_drafts(
    chain: Stack, client: Client, calm: tuple[int, ...]
) -> None:
    records = await chain.records()
    assert records["middle-1"].role is Role.MIDDLE
    assert records["middle-1"].model == "draft"
    assert records["cloud-1"].model == "target"
    assert records["middle-1"].endpoints.keys() == {"windows", "feedback"}
    usage = await drafted(client, calm)
    assert usage.middle_tokens >= usage.accepted_tokens > 0
    assert usage.middle_seconds > 0


async def drafted(client: Client, calm: tuple[int, ...]) -> Usage:
    """Usage of the first answer with accepted drafts: a middle worker that has just come may be
    late for one."""
    async with asyncio.timeout(120):
        while True:
            tokens, usage = await read_answer(client)
            assert tokens == calm
            if usage.accepted_tokens:
                return usage


@pytest.mark.parametrize("action", ["kill", "pause"])
@pytest.mark.parametrize("stage", ["middle-1", "cloud-1", "edge"])
async def test_a_stage_killed_or_paused_in_mid_answer(
    chain: Stack, client: Client, calm: tuple[int, ...], stage: str, action: str
) -> None:
    await all_ready(chain)
    resumed: list[asyncio.Task[None]] = []

    async def resume(pid: int) -> None:
        await asyncio.sleep(PAUSE_S)
        os.kill(pid, signal.SIGCONT)

    async def disturb(request_id: str) -> None:
        name = stage
        if stage == "edge":
            async with Redis.from_url(chain.redis_url, decode_responses=True) as redis:
                name = str(await redis.hget(Keys("e2sci:").request(request_id), "owner"))
        pid = chain.process(name).pid
        if action == "kill":
            os.kill(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGSTOP)
            resumed.append(asyncio.create_task(resume(pid)))

    tokens, _ = await read_answer(client, disturb)
    await asyncio.gather(*resumed)
    assert tokens == calm
    await all_ready(chain)
    await drafted(client, calm)
