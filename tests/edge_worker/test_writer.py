"""The writer of one answer: order, outages, a Redis restored from an older copy, a lost lease."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest

from bus.protocol.errors import StoreUnavailableError
from bus.protocol.messages import FinishReason
from bus.protocol.requests import GenerationRequest
from bus.store import Claim, EndEntry, ResultGapError, Store, TokensEntry, Usage
from edge_worker import writer as module
from edge_worker.writer import Piece, ResultWriter


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)


@pytest.fixture
async def claim(store: Store) -> Claim:
    await store.queue.submit(GenerationRequest(id="r1", prompt="Why?"))
    claim = await store.queue.take("edge-1", 1000)
    assert claim is not None
    return claim


def piece(start: int, *tokens: int) -> Piece:
    return Piece(start, tokens, (True,) * len(tokens), "x" * len(tokens), (1,) * len(tokens))


async def written(store: Store) -> tuple[list[int], str]:
    tokens, error = list[int](), ""
    async for entry in store.results.read("r1"):
        if isinstance(entry, TokensEntry):
            tokens += entry.tokens
        elif isinstance(entry, EndEntry):
            error = entry.end.error
    return tokens, error


async def test_pieces_come_in_order_and_only_the_first_end_counts(
    store: Store, claim: Claim
) -> None:
    writer = ResultWriter(store, claim, lambda: None)
    writer.put(piece(0, 1, 2))
    writer.put(piece(2, 3))
    writer.end(FinishReason.ERROR, "the first", Usage())
    writer.end(FinishReason.ERROR, "the second", Usage())
    await writer.run()
    assert await written(store) == ([1, 2, 3], "the first")


async def test_pieces_wait_from_when_they_were_put_and_not_each_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a delay for each one after the other, a long answer would lag its text."""
    monkeypatch.setattr(module, "DELAY_S", 5.0)
    loop, late_s, waited_s = asyncio.get_running_loop(), 0.0, list[float]()
    clock = loop.time

    async def sleep(seconds: float) -> None:
        nonlocal late_s
        waited_s.append(seconds)
        late_s += seconds

    store: Any = SimpleNamespace(
        results=AsyncMock(), queue=AsyncMock(), telemetry=AsyncMock(), commit_window=AsyncMock()
    )
    writer = ResultWriter(store, cast(Any, None), lambda: None)
    for start in range(4):
        writer.put(piece(start, 7))
    writer.end(FinishReason.LENGTH, "", Usage())
    with monkeypatch.context() as hurried:
        hurried.setattr(asyncio, "sleep", sleep)
        hurried.setattr(loop, "time", lambda: clock() + late_s)
        await writer.run()
    assert [call.args[1] for call in store.results.append.await_args_list] == [0, 1, 2, 3]
    assert len(waited_s) == 4
    assert sum(waited_s) == pytest.approx(5.0, abs=1.0)
    assert waited_s[0] > 4.0


async def test_while_redis_is_away_pieces_wait(
    store: Store, claim: Claim, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    append, failures = store.results.append, [StoreUnavailableError("away")] * 3

    async def flaky(*args: Any, **fields: Any) -> None:
        if failures:
            raise failures.pop()
        await append(*args, **fields)

    monkeypatch.setattr(store.results, "append", flaky)
    writer = ResultWriter(store, claim, lambda: None)
    writer.put(piece(0, 1, 2))
    writer.end(FinishReason.LENGTH, "", Usage())
    await writer.run()
    assert await written(store) == ([1, 2], "")
    assert caplog.text.count("keeping the answer and trying again") == 1


async def test_a_redis_restored_from_an_older_copy_gets_what_it_has_lost(
    store: Store, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, forgotten = store.results.append, list[int]()

    async def forgetful(claim: Claim, start: int, *args: Any, **fields: Any) -> None:
        if start == 2 and not forgotten:
            forgotten.append(start)  # written, as far as the writer knows
            return
        await append(claim, start, *args, **fields)

    monkeypatch.setattr(store.results, "append", forgetful)
    writer = ResultWriter(store, claim, lambda: None)
    for start in (0, 2, 4):
        writer.put(piece(start, start + 1, start + 2))
    writer.end(FinishReason.LENGTH, "", Usage())
    await writer.run()
    assert await written(store) == ([1, 2, 3, 4, 5, 6], "")


async def test_a_gap_that_it_cannot_fill_is_an_error(store: Store, claim: Claim) -> None:
    writer = ResultWriter(store, claim, lambda: None)
    writer.put(piece(4, 5))
    with pytest.raises(ResultGapError):
        await writer.run()


async def test_a_writer_whose_prompt_has_another_owner_stops_and_says_so(
    store: Store, claim: Claim
) -> None:
    lost = list[bool]()
    await store.queue.release(claim)
    assert await store.queue.take("edge-2", 1000) is not None
    writer = ResultWriter(store, claim, lambda: lost.append(True))
    writer.put(piece(0, 1))
    await writer.run()
    assert lost == [True]
