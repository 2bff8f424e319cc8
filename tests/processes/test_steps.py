"""An answer in steps whose workers are killed or held in the middle: the same tokens.

As `test_faults`, with a pair whose tokenizer has many blank lines, so that there are many steps.
"""

from __future__ import annotations

import asyncio
import os
import signal
import string
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from bus.client import Client
from bus.settings import BusSettings
from bus.store import FinishReason, Keys, Store, Usage
from launch.stack import Stack, StackOptions
from tests.engines.tiny import byte_level_tokenizer, save_tiny
from tests.processes.conftest import LEASE_S, PASS_MS, add_noise

pytestmark = [
    pytest.mark.slow, pytest.mark.long, pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
]  # fmt: skip

PROMPT = "the cat sat on the mat and"
TOKENS = 200
NOISE = 0.01


@pytest.fixture(scope="module")
def steps_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One token in six ends a step."""
    folder = tmp_path_factory.mktemp("steps")
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([f"{letter}\n\n" for letter in string.ascii_letters + string.digits])
    target = save_tiny(folder / "target", tokenizer)
    draft = save_tiny(folder / "draft", tokenizer)
    add_noise(draft, NOISE)
    return target, draft


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(steps_pair: tuple[Path, Path]) -> AsyncIterator[Stack]:
    target, draft = steps_pair
    options = StackOptions(target=str(target), draft=str(draft), dtype="float32", threads=1, edge=2)
    env = {"E2SCI_LEASE_S": str(LEASE_S), "OMP_NUM_THREADS": "1", "E2SCI_LEAST_PASS_MS": PASS_MS}
    async with Stack(options, log=lambda _: None, env=env) as running:
        yield running


async def read_answer(
    stack: Stack, disturb: Callable[[str], None] | None = None
) -> tuple[tuple[int, ...], Usage]:
    """One answer; `disturb` gets the edge that writes it, once some of it has come."""
    tokens: list[int] = []
    usage = Usage()
    async with Client(redis_url=stack.redis_url) as client, asyncio.timeout(120):
        request_id = await client.submit(
            PROMPT, max_new_tokens=TOKENS, temperature=0.8, seed=1, raw=True, method="lookahead"
        )
        async for chunk in client.stream(request_id):
            if chunk.end is not None:
                assert chunk.end.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
                usage = chunk.end.usage
                break
            assert chunk.start == len(tokens), "pieces follow each other"
            tokens += chunk.token_ids
            if disturb is not None and len(tokens) >= 20:
                disturb(await owner(stack, request_id))
                disturb = None
    assert disturb is None, "the answer was over before it could be disturbed"
    return tuple(tokens), usage


async def owner(stack: Stack, request_id: str) -> str:
    store = await Store.connect(BusSettings.load(redis_url=stack.redis_url))
    try:
        key = Keys("e2sci:").request(request_id)
        return str((await store._connection.execute("HGET", key, "owner")).decode())
    finally:
        await store.close()


async def test_the_same_tokens_whatever_is_killed_or_held(stack: Stack) -> None:
    calm, usage = await read_answer(stack)
    assert len(calm) > 100
    assert 2 < usage.accepted_steps < usage.steps

    def send(name: str, number: signal.Signals) -> None:
        os.kill(stack.process(name).pid, number)

    def held(name: str) -> None:
        """For longer than its lease and than an edge waits for feedback."""
        send(name, signal.SIGSTOP)
        loop = asyncio.get_running_loop()
        loop.call_later(3 * LEASE_S, send, name, signal.SIGCONT)

    disturbances: dict[str, Callable[[str], None]] = {
        "cloud killed": lambda _: send("cloud-1", signal.SIGKILL),
        "edge killed": lambda edge: send(edge, signal.SIGKILL),
        "cloud held": lambda _: held("cloud-1"),
        "edge held": held,
        "controller killed": lambda _: send("controller", signal.SIGKILL),
    }
    for what, disturb in disturbances.items():
        assert (await read_answer(stack, disturb))[0] == calm, what
        await asyncio.sleep(3 * LEASE_S)
        await everybody(stack)


async def everybody(stack: Stack) -> None:
    """Wait until all workers are registered."""
    store = await Store.connect(BusSettings.load(redis_url=stack.redis_url))
    try:
        async with asyncio.timeout(90):
            live: set[str] = set()
            while not live >= set(stack.worker_names):
                await asyncio.sleep(0.1)
                live = {record.worker_id for record in await store.registry.workers()}
    finally:
        await store.close()
