"""The edge worker takes prompts over, loses them, and hands them back."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bus.protocol.messages import (
    FinishReason,
)
from bus.settings import BusSettings
from bus.store import Keys, Store
from bus.store.keys import GROUP
from edge_worker.server import REOPENS_PER_TERM, serve
from edge_worker.settings import EdgeSettings
from tests.bus.test_metrics import shown
from tests.edge_worker.shell import House, ToyTokenizer
from tests.engines.tiny import save_tiny


async def test_a_lost_lease_ends_the_run_that_held_it(
    house: House, store: Store, redis: Any, key_prefix: str
) -> None:
    house.cloud(pass_s=0.02)
    house.start()
    await house.submit("r1", max_new_tokens=200)
    await house.until(house.opens)
    await asyncio.sleep(0.2)
    key = Keys(key_prefix).prompts
    (entry,) = await redis.xpending_range(key, GROUP, "-", "+", 10)
    await redis.xclaim(key, GROUP, "edge-1", 0, [entry["message_id"]], idle=60_000, justid=True)
    claim = await store.queue.take("edge-2", 1)
    assert claim is not None
    await house.until(lambda: house.sockets.counters["lost_leases"] == 1)
    await house.until(house.closes)
    assert claim.streamed_tokens == house.expected("r1", 200)[: len(claim.streamed_tokens)]


async def test_a_prompt_that_this_edge_claims_again_goes_on(
    house: House, store: Store, redis: Any, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis was silent: the lease ran out, and this same edge takes the prompt up again before it
    is told that the old lease is lost."""
    renew, asked, may_answer = store.queue.renew, asyncio.Event(), asyncio.Event()

    async def slow(edge: str, claims: Any) -> set[str]:
        if asked.is_set():
            return await renew(edge, claims)
        asked.set()
        await may_answer.wait()
        return {claim.request_id for claim in claims}

    monkeypatch.setattr(store.queue, "renew", slow)
    house.cloud(pass_s=0.02)
    house.start(lease_s=0.3)
    await house.submit("r1", max_new_tokens=200)
    await asyncio.wait_for(asked.wait(), 20.0)
    key = Keys(key_prefix).prompts
    (entry,) = await redis.xpending_range(key, GROUP, "-", "+", 10)
    await redis.xclaim(key, GROUP, "edge-1", 0, [entry["message_id"]], idle=60_000, justid=True)
    await house.until(lambda: house.opens()[-1].incarnation > 2 * REOPENS_PER_TERM)
    may_answer.set()
    assert (await house.answer("r1"))[0] == house.expected("r1", 200)
    assert house.sockets.counters["lost_leases"] == 1
    values = shown(house.monitor.metrics)
    assert values["e2sci:lease_losses_total"] == 1
    ended = {name for name, value in values.items() if "request_success" in name and value}
    assert ended == {"e2sci:request_success_total{finished_reason=length}"}, "the lost run did not"


async def test_a_worker_that_leaves_hands_its_prompt_back_at_once(
    house: House, store: Store
) -> None:
    house.cloud(pass_s=0.02)
    house.start()
    await house.submit("r1", max_new_tokens=200)
    await house.until(house.opens)
    house.lifecycle.draining.set()
    await house.edge.drain(0.05)
    claim = await store.queue.take("edge-2", 1)
    assert claim is not None
    assert (claim.request_id, claim.deliveries) == ("r1", 1)
    for task in list(house.tasks):
        if task.done():
            house.tasks.remove(task)


async def test_an_answer_goes_on_behind_what_was_streamed(house: House, store: Store) -> None:
    expected = house.expected("r1")
    await house.submit("r1")
    claim = await store.queue.take("edge-0", 1000)
    assert claim is not None
    text = ToyTokenizer().decode(expected[:5])
    await store.results.append(claim, 0, expected[:5], (True,) * 5, text, (1,) * 5)
    await store.queue.release(claim)
    house.cloud()
    house.start()
    tokens, shown, end = await house.answer("r1")
    assert tokens == expected
    assert shown == ToyTokenizer().decode(expected)
    assert end.end.usage.completion_tokens == len(expected)


async def test_an_answer_that_was_complete_but_for_its_end_is_ended(
    house: House, store: Store
) -> None:
    expected = house.expected("r1")
    text = ToyTokenizer().decode(expected[:6])
    await house.submit("r1", stop=(text[4:6],))
    claim = await store.queue.take("edge-0", 1000)
    assert claim is not None
    await store.results.append(claim, 0, expected[:6], (True,) * 6, text[:4], (1,) * 4)
    await store.queue.release(claim)
    house.cloud()
    house.start()
    assert (await house.answer("r1"))[2].end.finish_reason is FinishReason.STOP


async def test_the_worker_as_a_process_runs_it(
    store: Store, bus_settings: BusSettings, tmp_path: Path
) -> None:
    """Loads its draft, registers, and leaves on SIGTERM."""
    settings = EdgeSettings.load(
        worker_id="edge-7", draft=str(save_tiny(tmp_path)), dtype="float32", device="cpu",
        redis_url=bus_settings.redis_url, key_prefix=bus_settings.key_prefix, drain_s=0.1,
    )  # fmt: skip
    serving = asyncio.create_task(serve(settings))

    async def registered() -> list[str]:
        return [record.worker_id for record in await store.registry.workers("edge")]

    async with asyncio.timeout(60.0):
        while await registered() != ["edge-7"]:
            assert not serving.done(), serving
            await asyncio.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
    assert await registered() == []
