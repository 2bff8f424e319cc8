"""How a claimed request is kept, ends and is cancelled: leases, terms, dead letters."""

from __future__ import annotations

from typing import Any

import pytest

from bus.protocol.errors import OwnershipLostError
from bus.protocol.requests import new_request
from bus.store import End, FinishReason, Store
from bus.store.keys import GROUP, Keys
from tests.bus.conftest import LossyLine
from tests.bus.queue_steps import (
    NO_WAIT_MS,
    STOP,
    Entries,
    Expire,
    request_hash,
    submitted,
    take,
)

# --- keeping ------------------------------------------------------------------------------------


async def test_a_renewed_lease_is_not_taken(store: Store, expire_leases: Expire) -> None:
    await submitted(store)
    claim = await take(store)
    await expire_leases()
    assert await store.queue.renew("edge-1", [claim]) == set()
    assert await store.queue.take("edge-2", NO_WAIT_MS) is None


async def test_a_zombie_can_write_nothing(store: Store, expire_leases: Expire) -> None:
    request_id = await submitted(store)
    zombie = await take(store)
    await expire_leases()
    owner = await take(store, "edge-2")
    assert await store.queue.renew("edge-1", [zombie]) == {request_id}
    with pytest.raises(OwnershipLostError, match="our term was 1"):
        await store.results.append(zombie, 0, [1], [True], "x")
    with pytest.raises(OwnershipLostError, match="its end was not written"):
        await store.queue.finish(zombie, STOP)
    with pytest.raises(OwnershipLostError):
        await store.queue.bury(zombie, "broken")
    await store.queue.release(zombie)
    # Nothing of that has touched the owner.
    assert await store.queue.renew("edge-2", [owner]) == set()
    await store.results.append(owner, 0, [2], [True], "y")
    await store.queue.finish(owner, STOP)


async def test_the_same_edge_restarted_is_another_term(store: Store, expire_leases: Expire) -> None:
    await submitted(store)
    before = await take(store)
    await expire_leases()
    after = await take(store)
    assert after.term == 2
    with pytest.raises(OwnershipLostError):
        await store.results.append(before, 0, [1], [True], "x")


async def test_renew_tells_the_lost_from_the_kept(store: Store, redis: Any, keys: Keys) -> None:
    ids = [await submitted(store) for _ in range(3)]
    claims = [await take(store) for _ in ids]
    await store.queue.finish(claims[0], STOP)
    await redis.xack(keys.prompts, GROUP, claims[2].entry_id)  # by hand, or an old copy of Redis
    # The first has ended by our own hand: nothing to renew, and no lease was lost.
    assert await store.queue.renew("edge-1", claims) == {ids[2]}
    assert await redis.ttl(keys.request(ids[1])) == -1
    assert await redis.ttl(keys.request(ids[2])) > 0
    assert await store.queue.renew("edge-1", []) == set()


async def test_release_counts_nothing_and_needs_no_lease_to_expire(
    store: Store, redis: Any, keys: Keys
) -> None:
    request_id = await submitted(store)
    for round_ in range(5):  # more often than there are deliveries
        claim = await take(store, f"edge-{round_}")
        assert claim.deliveries == 1
        await store.results.append(claim, round_, [round_], [True], "x")
        await store.queue.release(claim)
        await store.queue.release(claim)  # repeated because the reply was lost
        with pytest.raises(OwnershipLostError):
            await store.results.append(claim, round_ + 1, [9], [True], "late")
    assert (await request_hash(redis, keys, request_id))["deliveries"] == "0"
    assert (await take(store)).streamed_tokens == (0, 1, 2, 3, 4)


# --- ending -------------------------------------------------------------------------------------


async def test_finish_ends_everything_at_once(
    store: Store, redis: Any, keys: Keys, entries_of: Entries
) -> None:
    request_id = await submitted(store)
    claim = await take(store)
    await store.results.append(claim, 0, [7, 8], [True, False], "Hi")
    await store.queue.cancel(request_id)
    await store.queue.finish(claim, STOP)
    await store.queue.finish(claim, STOP)
    tokens, end = await entries_of(keys.result(request_id))
    assert tokens["kind"] == "tokens"
    assert (end["kind"], end["finish_reason"], end["error"]) == ("end", "stop", "")
    assert (await request_hash(redis, keys, request_id))["state"] == "done"
    assert await redis.xlen(keys.prompts) == 0
    assert (await redis.xpending(keys.prompts, GROUP))["pending"] == 0
    assert 0 < await redis.ttl(keys.request(request_id)) <= 3600
    assert 0 < await redis.ttl(keys.result(request_id)) <= 3600
    assert not await redis.exists(keys.cancel(request_id))
    with pytest.raises(OwnershipLostError):
        await store.results.append(claim, 2, [9], [True], "late")


async def test_nothing_of_an_unfinished_request_expires(
    store: Store, redis: Any, keys: Keys
) -> None:
    request_id = await submitted(store)
    claim = await take(store)
    await store.results.append(claim, 0, [7], [True], "Hi")
    for key in (keys.request(request_id), keys.result(request_id)):
        assert await redis.ttl(key) == -1
        await redis.expire(key, 60)  # as a renewal does that finds the entry gone for a while
    await store.queue.release(claim)
    await take(store)
    for key in (keys.request(request_id), keys.result(request_id)):
        assert await redis.ttl(key) == -1


async def test_a_lost_reply_to_finish_ends_once(
    lossy: tuple[LossyLine, Store], keys: Keys, entries_of: Entries
) -> None:
    line, store = lossy
    for _ in range(2):  # the second time the script is known, and the reply lost is its own
        request_id = await submitted(store)
        claim = await take(store)
        line.lose_next_reply = True
        await store.queue.finish(claim, STOP)
        assert [entry["kind"] for entry in await entries_of(keys.result(request_id))] == ["end"]
    assert line.num_lost == 2


async def test_after_three_deliveries_a_request_is_given_up(
    store: Store, redis: Any, keys: Keys, expire_leases: Expire, entries_of: Entries
) -> None:
    request = new_request("Poison", client="me").model_copy(update={"id": "poison"})
    await store.queue.submit(request)
    for delivery in (1, 2, 3):
        claim = await take(store, f"edge-{delivery}")
        assert claim.request == request
        assert claim.deliveries == delivery
        await expire_leases()
    await take(store, "edge-4")  # the edge that should bury it dies as well
    await expire_leases()
    last = await take(store, "edge-5")
    assert last.request is None
    assert last.given_up
    assert last.deliveries == 3
    assert "given up after 3 deliveries" in str(last.problem)
    await store.queue.refuse(last)
    await store.queue.refuse(last)
    (end,) = await entries_of(keys.result("poison"))
    assert (end["finish_reason"], end["error"]) == ("error", last.problem)
    (letter,) = await entries_of(keys.dead)
    assert letter == request.to_fields() | {"reason": last.problem}
    assert (await store.queue.depth()).length == 0


async def test_a_lone_surrogate_in_an_error_text_does_no_harm(
    store: Store, keys: Keys, entries_of: Entries
) -> None:
    request_id = await submitted(store)
    await store.queue.finish(await take(store), End(FinishReason.ERROR, "bad \ud800"))
    (end,) = await entries_of(keys.result(request_id))
    assert end["error"] == "bad ?"


async def test_an_entry_whose_request_has_ended_is_not_run_again(
    store: Store, redis: Any, keys: Keys
) -> None:
    request = new_request("Hello")
    await store.queue.submit(request)
    await store.queue.finish(await take(store), STOP)
    await redis.delete(keys.request(request.id))  # its result is still there
    await redis.xadd(keys.prompts, dict(request.to_fields()))
    assert await store.queue.take("edge-2", NO_WAIT_MS) is None
    assert (await store.queue.depth()).length == 0


# --- cancelling ---------------------------------------------------------------------------------


async def test_cancelling_a_waiting_request_ends_it_at_once(
    store: Store, keys: Keys, entries_of: Entries
) -> None:
    request_id = await submitted(store)
    await store.queue.cancel(request_id)
    await store.queue.cancel(request_id)
    (end,) = await entries_of(keys.result(request_id))
    assert end["finish_reason"] == "cancelled"
    assert await store.queue.take("edge-1", NO_WAIT_MS) is None
    assert (await store.queue.depth()).length == 0


async def test_cancelling_between_reading_and_claiming(
    store: Store, redis: Any, keys: Keys, expire_leases: Expire
) -> None:
    await store.queue.ensure_group()
    request_id = await submitted(store)
    await redis.xreadgroup(GROUP, "edge-1", {keys.prompts: ">"})
    await store.queue.cancel(request_id)
    depth = await store.queue.depth()
    assert (depth.length, depth.pending) == (0, 0)
    await expire_leases()
    assert await store.queue.take("edge-2", NO_WAIT_MS) is None


async def test_cancelling_a_released_request_reports_its_tokens(
    store: Store, keys: Keys, entries_of: Entries
) -> None:
    request_id = await submitted(store)
    claim = await take(store)
    await store.results.append(claim, 0, [1, 2], [True, True], "ab")
    await store.queue.release(claim)
    await store.queue.cancel(request_id)
    entries = await entries_of(keys.result(request_id))
    assert [entry["kind"] for entry in entries] == ["tokens", "end"]
    assert entries[-1]["usage"] == '{"completion_tokens":2}'


async def test_cancelling_a_running_request_marks_it(store: Store, redis: Any, keys: Keys) -> None:
    running, other = await submitted(store), await submitted(store)
    claim = await take(store)
    await take(store)
    assert await store.queue.cancelled([running, other]) == set()
    await store.queue.cancel(running)
    assert await store.queue.cancelled([running, other]) == {running}
    assert await redis.ttl(keys.cancel(running)) > 0
    await store.queue.finish(claim, End(FinishReason.CANCELLED))
    assert await store.queue.cancelled([running, other]) == set()
    await store.queue.cancel(running)  # too late: it leaves nothing
    assert not await redis.exists(keys.cancel(running))
    assert await store.queue.cancelled([]) == set()


async def test_a_mark_set_by_hand_counts(store: Store, redis: Any, keys: Keys) -> None:
    request_id = await submitted(store)
    await take(store)
    await redis.set(keys.cancel(request_id), "please")
    assert await store.queue.cancelled([request_id]) == {request_id}


# --- looking ------------------------------------------------------------------------------------


async def test_depth(store: Store, redis: Any, keys: Keys) -> None:
    empty = await store.queue.depth()
    assert (empty.length, empty.pending, empty.oldest_age_s) == (0, 0, 0.0)
    seconds, _ = await redis.time()
    await redis.xadd(keys.prompts, {"prompt": "old"}, id=f"{(seconds - 100) * 1000}-0")
    await submitted(store)
    without_group = await store.queue.depth()
    assert (without_group.length, without_group.pending) == (2, 0)
    await take(store)
    depth = await store.queue.depth()
    assert (depth.length, depth.pending) == (2, 1)
    assert depth.oldest_age_s >= 100


async def test_pieces_of_an_edge_that_knew_no_probes_are_read(
    store: Store, redis: Any, keys: Keys, expire_leases: Expire
) -> None:
    request_id = await submitted(store)
    await take(store)
    piece = {"kind": "tokens", "start": 0, "tokens": "[11]", "accepted": "[1]", "text": "x"}
    await redis.xadd(keys.result(request_id), {**piece, "term": 1})
    await expire_leases()
    new = await take(store, "edge-2")
    assert (new.streamed_tokens, new.streamed_probes) == ((11,), ("",))
