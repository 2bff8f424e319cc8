"""Runs of the real command, and a scripted edge worker for it to talk to."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bus.settings import BusSettings
from bus.store import Claim, End, FinishReason, Role, Store, Usage, WorkerRecord
from bus.store.blocking import BlockingStore
from cli.main import app

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No E2SCI_ setting and no running `up` of the developer's reaches a test."""
    for name in [name for name in os.environ if name.startswith("E2SCI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def reachable(clean_environment: None, monkeypatch: pytest.MonkeyPatch,
              bus_settings: BusSettings) -> None:  # fmt: skip
    """The test's Redis, named in the environment."""
    monkeypatch.setenv("E2SCI_REDIS_URL", bus_settings.redis_url)
    monkeypatch.setenv("E2SCI_KEY_PREFIX", bus_settings.key_prefix)


@dataclass(frozen=True, slots=True)
class Done:
    status: int
    out: str
    err: str


async def start(*args: str) -> asyncio.subprocess.Process:
    """`e2sci …` in a process of its own."""
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cli.main", *args, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe
    )


async def finish(process: asyncio.subprocess.Process, stdin: bytes = b"") -> Done:
    out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())


async def e2sci(*args: str, stdin: bytes = b"") -> Done:
    """`e2sci …` to its end."""
    return await finish(await start(*args), stdin)


def invoke(*args: str, stdin: bytes = b"") -> Done:
    """`e2sci …` in this process, which spares its start: for what is no matter of processes.

    Commands run a loop of their own, so this is not for coroutines.
    """
    done = CliRunner().invoke(app, args, input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Done(done.exit_code, done.stdout, done.stderr)


class ScriptedEdge:
    """Plays an edge worker: takes one request at a time and answers it with fixed pieces.

    With `hold` it stops before the end of the answer, until the request is cancelled.
    """

    PIECES = (((11, 12), "Hello"), ((13,), " wörld"))

    def __init__(self, store: Store) -> None:
        self.store = store
        self.hold = False
        self.error = ""
        self.counters = {"faults": 2}
        self.claims: list[Claim] = []

    async def beat(self) -> None:
        now = time.time()
        await self.store.registry.beat(
            WorkerRecord(worker_id="edge-x", role=Role.EDGE, boot="1", started_at=now,
                         model="tiny", dtype="float32", device="cpu", load=1, capacity=4,
                         counters=self.counters, bitwise=True, probe_digest="a1b2c3d4" * 8),
            ttl_s=60,
        )  # fmt: skip

    async def serve(self) -> None:
        while True:
            claim = await self.store.queue.take("edge-x", block_ms=100)
            if claim is not None:
                self.claims.append(claim)
                await self._answer(claim)

    async def _answer(self, claim: Claim) -> None:
        position = 0
        for tokens, text in self.PIECES:
            flags = [True] * len(tokens)
            await self.store.results.append(claim, position, tokens, flags, text)
            position += len(tokens)
        reason = FinishReason.ERROR if self.error else FinishReason.STOP
        if self.hold:
            reason = FinishReason.CANCELLED
            while not await self.store.queue.cancelled(  # noqa: ASYNC110 - a key has no event
                [claim.request_id]
            ):
                await asyncio.sleep(0.02)
        usage = Usage(completion_tokens=position)
        await self.store.queue.finish(claim, End(reason, self.error, usage))


async def stop(task: asyncio.Task[None]) -> None:
    """Cancel until it ends: redis-py sends under asyncio.wait_for, whose Python 3.11 version
    swallows a cancellation that arrives together with the result."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.2)


@pytest.fixture
async def edge(store: Store) -> AsyncIterator[ScriptedEdge]:
    scripted = ScriptedEdge(store)
    await scripted.beat()
    task = asyncio.create_task(scripted.serve())
    yield scripted
    await stop(task)


@pytest.fixture
def blocking(bus_settings: BusSettings) -> Iterator[BlockingStore]:
    """The test's store, beside a command that runs in this process."""
    with closing(BlockingStore(bus_settings)) as store:
        yield store


@pytest.fixture
def edge_beside(blocking: BlockingStore) -> Iterator[ScriptedEdge]:
    """As `edge`, on the loop of `blocking`."""

    async def begin(store: Store) -> tuple[ScriptedEdge, asyncio.Task[None]]:
        scripted = ScriptedEdge(store)
        await scripted.beat()
        return scripted, asyncio.create_task(scripted.serve())

    scripted, task = blocking.call(begin)
    yield scripted
    blocking.call(lambda _: stop(task))
