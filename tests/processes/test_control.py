"""A controller that dies in the middle of an answer: the conservative threshold, and then credit
again from where it was."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from itertools import groupby
from pathlib import Path

import pytest
import pytest_asyncio

from bus.client import Client
from bus.protocol.requests import session_id
from bus.settings import BusSettings
from bus.store import SessionRecord, Store, WindowEntry
from launch.stack import Stack, StackOptions

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

CONSERVATIVE, LEAST = 0.02, 0.05
TTL_S = 0.5


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tiny_pair: tuple[Path, Path]) -> AsyncIterator[Stack]:
    """With a link so slow that the answer lasts longer than a controller takes to start."""
    target, draft = map(str, tiny_pair)
    env = {
        "OMP_NUM_THREADS": "1", "E2SCI_CALIBRATION": "none", "E2SCI_TAKEOVER_S": "0.5",
        "E2SCI_LEAST_THRESHOLD": str(LEAST), "E2SCI_CONTROL_TTL_S": str(TTL_S),
    }  # fmt: skip
    options = StackOptions(target=target, draft=draft, dtype="float32", threads=1, link="120ms")
    async with Stack(options, log=lambda _: None, env=env) as running:
        yield running


@pytest.mark.long
async def test_credit_goes_on_after_a_conservative_stretch(stack: Stack) -> None:
    store = await Store.connect(BusSettings.load(redis_url=stack.redis_url))
    async with Client(redis_url=stack.redis_url) as client, asyncio.timeout(100):
        request = await client.submit(
            "the cat sat on the mat and", method="e2sci-no-plc", max_new_tokens=400,
            temperature=0.8, seed=1, raw=True,
        )  # fmt: skip
        old: SessionRecord | None = None
        new: SessionRecord | None = None
        num_tokens = enough = 0
        async for chunk in client.stream(request):
            num_tokens += len(chunk.token_ids)
            if old is None and num_tokens >= 30:
                old = await kill_controller(stack, store, session_id(request))
            elif old is not None and new is None:
                record = await store.sessions.load(session_id(request))
                new = record if record is not None and record.term > old.term else None
                enough = num_tokens + 20
            elif new is not None and num_tokens >= enough:
                await client.cancel(request)
    entries = [entry for _, entry in await store.telemetry.read()]
    await store.close()
    assert old is not None
    assert new is not None, "the answer was over before the controller was back"
    assert new.version > old.version
    assert set(old.history) & set(new.history), "it remembers windows its predecessor saw"
    windows = [e for e in entries if isinstance(e, WindowEntry)]
    kinds = ["conservative" if w.threshold < LEAST else "credit" for w in windows]
    stretches = [kind for kind, _ in groupby(kinds)]
    assert stretches[-3:] == ["credit", "conservative", "credit"]
    assert {round(w.threshold, 4) for w in windows if w.threshold < LEAST} == {CONSERVATIVE}


async def kill_controller(stack: Stack, store: Store, session: str) -> SessionRecord:
    """Kill it; what it had written of the session until then."""
    pid = stack.process("controller").pid
    os.kill(pid, signal.SIGSTOP)
    record = await store.sessions.load(session)
    os.kill(pid, signal.SIGKILL)
    assert record is not None
    return record
