"""Result streams on a real Valkey: pieces without gap or double, readers that get each once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bus.protocol.errors import (
    LocalError,
    OwnershipLostError,
    RemoteError,
    RequestFailedError,
    RequestTimeoutError,
)
from bus.protocol.requests import GenerationRequest, new_request
from bus.store import (
    Claim,
    End,
    EndEntry,
    FinishReason,
    ResultGapError,
    Store,
    TokensEntry,
    Usage,
    WindowEntry,
)
from bus.store.keys import Keys
from tests.bus.conftest import LossyLine

Entries = Callable[[str], Awaitable[list[dict[str, str]]]]

WINDOW = WindowEntry(
    at_ms=1, request="r", session="s", client="c", edge="e", cloud="k", method="sd",
    incarnation=1, number=3, outcome="accepted", num_drafted=4, num_accepted=4, num_committed=5,
    rollback=False, threshold=0.5, window=4, credit=0.0, draft_ms=1.5, verify_ms=2.5,
    queue_ms=0.0, rtt_ms=3.25,
    bytes_up=100, bytes_down=50,
)  # fmt: skip


@pytest.fixture
async def claim(store: Store) -> Claim:
    await store.queue.submit(new_request("Hello"))
    claim = await store.queue.take("edge-1", 1)
    assert claim is not None
    return claim


async def test_what_is_appended_is_read(store: Store, claim: Claim) -> None:
    usage = Usage(prompt_tokens=4, acceptance=0.5, lossless=True)
    await store.results.append(claim, 0, [5, 6], [True, False], "Grüße", [2, 3])
    await store.results.append(claim, 2, [], [], "!")
    await store.queue.finish(claim, End(FinishReason.LENGTH, usage=usage))
    one, two, end = [entry async for entry in store.results.read(claim.request_id)]
    assert one == TokensEntry(one.entry_id, 0, (5, 6), (True, False), "Grüße", 1, (2, 3))
    assert two == TokensEntry(two.entry_id, 2, (), (), "!", 1)
    assert end == EndEntry(end.entry_id, End(FinishReason.LENGTH, usage=usage), 1)
    rest = [entry async for entry in store.results.read(claim.request_id, after=one.entry_id)]
    assert rest == [two, end]


async def test_the_entry_is_what_the_documentation_says(
    store: Store, claim: Claim, keys: Keys, entries_of: Entries
) -> None:
    await store.results.append(claim, 0, [5, 6], [True, False], "Hi", [1, 1], probe="a1b2")
    (entry,) = await entries_of(keys.result(claim.request_id))
    assert entry == {
        "kind": "tokens", "start": "0", "tokens": "[5,6]", "text": "Hi", "accepted": "[1,0]",
        "lengths": "[1,1]", "probe": "a1b2", "term": "1",
    }  # fmt: skip


async def test_a_repeat_of_the_last_piece_changes_nothing(
    store: Store, claim: Claim, keys: Keys, entries_of: Entries
) -> None:
    await store.results.append(claim, 0, [5, 6], [True, False], "Hi")
    await store.results.append(claim, 0, [5, 6], [True, False], "Hi")
    await store.results.append(claim, 2, [], [], " there")
    await store.results.append(claim, 2, [], [], " there")
    await store.results.append(claim, 2, [7], [True], "!")
    texts = [entry["text"] for entry in await entries_of(keys.result(claim.request_id))]
    assert texts == ["Hi", " there", "!"]


async def test_gap_overlap_and_another_piece_in_the_same_place(
    store: Store, claim: Claim, keys: Keys, entries_of: Entries
) -> None:
    await store.results.append(claim, 0, [5, 6], [True, False], "Hi")
    for start, tokens in ((3, [7]), (1, [6, 7]), (0, [5, 7]), (0, [5])):
        with pytest.raises(ResultGapError, match="the result goes on at 2") as caught:
            await store.results.append(claim, start, tokens, [False] * len(tokens), "Hi")
        assert caught.value.next_position == 2
        assert isinstance(caught.value, LocalError)
    with pytest.raises(LocalError, match="1 tokens but 2 accepted"):
        await store.results.append(claim, 2, [7], [True, True], "!")
    assert len(await entries_of(keys.result(claim.request_id))) == 1


async def test_a_repeat_under_an_older_term_is_refused(
    store: Store, claim: Claim, impatient: Store
) -> None:
    await store.results.append(claim, 0, [5], [True], "a")
    while await impatient.queue.take("edge-2", 10) is None:
        pass
    with pytest.raises(OwnershipLostError):
        await store.results.append(claim, 0, [5], [True], "a")


async def test_a_window_and_its_telemetry_are_one(
    store: Store, claim: Claim, impatient: Store
) -> None:
    for _ in range(2):
        await store.commit_window(claim, 0, [5, 6], [True, False], "Hi", WINDOW)
    assert [entry for _, entry in await store.telemetry.read()] == [WINDOW]
    with pytest.raises(ResultGapError):
        await store.commit_window(claim, 9, [5], [True], "x", WINDOW)
    while await impatient.queue.take("edge-2", 10) is None:
        pass
    with pytest.raises(OwnershipLostError):
        await store.commit_window(claim, 2, [5], [True], "x", WINDOW)
    assert len(await store.telemetry.read()) == 1


async def test_a_lost_reply_doubles_neither_piece_nor_telemetry(
    lossy: tuple[LossyLine, Store], keys: Keys, entries_of: Entries
) -> None:
    line, store = lossy
    await store.queue.submit(new_request("Hello"))
    claim = await store.queue.take("edge-1", 1)
    assert claim is not None
    await store.commit_window(claim, 0, [1], [True], "a", WINDOW)
    line.lose_next_reply = True
    await store.commit_window(claim, 1, [2], [True], "b", WINDOW)
    assert line.num_lost == 1
    texts = [entry["text"] for entry in await entries_of(keys.result(claim.request_id))]
    assert texts == ["a", "b"]
    assert len(await store.telemetry.read()) == 2


async def test_a_reader_follows_while_it_is_written_by_two_owners(
    store: Store, claim: Claim
) -> None:
    async def read() -> list[TokensEntry | EndEntry]:
        return [entry async for entry in store.results.read(claim.request_id, timeout_s=60)]

    reading = asyncio.create_task(read())
    await store.results.append(claim, 0, [1], [True], "a")
    await asyncio.sleep(0)
    await store.queue.release(claim)
    second = await store.queue.take("edge-2", 1)
    assert second is not None
    await store.results.append(second, 1, [2], [True], "b")
    await store.queue.finish(second, End(FinishReason.STOP))
    *pieces, end = await reading
    assert [(piece.start, piece.term) for piece in pieces if isinstance(piece, TokensEntry)] == [
        (0, 1),
        (1, 3),
    ]
    assert isinstance(end, EndEntry)


async def test_a_reader_gives_up_when_its_time_is_over(store: Store, claim: Claim) -> None:
    await store.results.append(claim, 0, [1], [True], "a")
    reader = store.results.read(claim.request_id, timeout_s=0.2)
    assert isinstance(await anext(reader), TokensEntry)
    with pytest.raises(RequestTimeoutError, match=r"no end within 0\.2 s"):
        await anext(reader)


async def test_a_reader_learns_that_the_request_is_gone(
    store: Store, claim: Claim, redis: Any, keys: Keys
) -> None:
    await store.results.append(claim, 0, [1], [True], "a")
    reader = store.results.read(claim.request_id, timeout_s=60)
    await anext(reader)
    await redis.delete(keys.request(claim.request_id), keys.result(claim.request_id))
    with pytest.raises(RequestFailedError, match="gone without an end"):
        await anext(reader)


async def test_a_reader_skips_what_it_has_read_before(
    store: Store, claim: Claim, redis: Any, keys: Keys
) -> None:
    """Redis came back from an older copy, and the owner wrote the lost pieces again."""
    await store.results.append(claim, 0, [1], [True], "a")
    await store.results.append(claim, 1, [2], [True], "b")
    seen = []
    async for entry in store.results.read(claim.request_id, timeout_s=60):
        seen.append(entry)
        if len(seen) == 2:
            assert isinstance(entry, TokensEntry)
            await redis.xdel(keys.result(claim.request_id), entry.entry_id)
            await redis.hset(keys.request(claim.request_id), "next", "1")
            await store.results.append(claim, 1, [2], [True], "b")
            await store.results.append(claim, 2, [3], [True], "c")
            await store.queue.finish(claim, End(FinishReason.STOP))
    assert "".join(e.text for e in seen if isinstance(e, TokensEntry)) == "abc"


async def test_a_foreign_entry_is_an_error_with_its_id(
    store: Store, redis: Any, keys: Keys
) -> None:
    entry_id = (await redis.xadd(keys.result("x"), {"kind": "tokens", "term": "1"})).decode()
    with pytest.raises(RemoteError, match=entry_id):
        await anext(aiter(store.results.read("x", timeout_s=60)))


async def test_more_readers_than_a_pool_of_a_hundred_connections(store: Store) -> None:
    """redis-py's default; each blocking read holds a connection."""
    names = [f"many-{number}" for number in range(150)]
    for name in names:
        await store.queue.submit(GenerationRequest(id=name, prompt="x"))

    async def first_of(name: str) -> TokensEntry | EndEntry:
        async for entry in store.results.read(name, timeout_s=30):
            return entry
        raise AssertionError("no entry")

    reading = [asyncio.create_task(first_of(name)) for name in names]
    await asyncio.sleep(0.2)
    for name in names:
        await store.queue.cancel(name)
    ends = await asyncio.gather(*reading)
    assert all(isinstance(entry, EndEntry) for entry in ends)
