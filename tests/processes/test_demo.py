"""The demo's last prompt on real processes: the controller's updates arrive while text streams."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from rich.console import Console

from bench import demo
from bench.updates import Updates, subscribed
from bus.client import Client
from bus.protocol.messages import ControlUpdate, FinishReason, Message
from bus.settings import BusSettings
from bus.store import Store, WindowEntry
from launch.stack import Stack, StackOptions
from tests.processes.conftest import PASS_MS

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.asyncio(loop_scope="module")]

PROMPT = "the cat sat on the mat and"
CONSERVATIVE = 0.02
"""What an edge uses until the session's first update arrives."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tiny_pair: tuple[Path, Path]) -> AsyncIterator[Stack]:
    """Without a calibration, which would not fit this pair, credit moves the threshold freely."""
    target, draft = map(str, tiny_pair)
    options = StackOptions(target=target, draft=draft, dtype="float32", threads=1)
    env = {
        "OMP_NUM_THREADS": "1", "E2SCI_CALIBRATION": "none", "E2SCI_LEAST_PASS_MS": PASS_MS,
    }  # fmt: skip
    async with Stack(options, log=lambda _: None, env=env) as running:
        yield running


class Recorded(Updates):
    """Keeps what is received."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[ControlUpdate] = []

    def receive(self, message: Message) -> None:
        super().receive(message)
        if isinstance(message, ControlUpdate):
            self.received.append(message)


async def test_the_updates_shown_are_those_the_windows_were_drafted_under(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.updates.Updates", Recorded)
    out = io.StringIO()
    screen = demo.Screen(Console(file=out, width=1000))
    async with Client(redis_url=stack.redis_url) as client, subscribed(stack.redis_url) as updates:
        await client.generate(PROMPT, max_new_tokens=8)  # a cold draft judges a window or none
        end, changes = await demo.answer_by_credit(client, PROMPT, updates, screen)
    assert end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert not end.usage.lossless
    lines = out.getvalue().splitlines()
    arrows = [line for line in lines if line.startswith("  controller: ") and "→" in line]
    assert len(arrows) == changes > 0
    assert any("lossy" in line for line in lines[:2])

    store = await Store.connect(BusSettings.load(redis_url=stack.redis_url))
    entries = [entry for _, entry in await store.telemetry.read()]
    await store.close()
    windows = [e for e in entries if isinstance(e, WindowEntry) and e.num_drafted]
    used = {round(window.threshold, 4) for window in windows}
    assert isinstance(updates, Recorded)
    published = {round(update.threshold, 4) for update in updates.received}
    assert used - {CONSERVATIVE} <= published
    assert used & published
