"""The queue on a real Valkey: who may take, keep, hand back and end a request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bus.protocol.errors import OwnershipLostError, QueueFullError, RequestError
from bus.protocol.requests import new_request, seed_from_id
from bus.settings import BusSettings
from bus.store import Claim, End, FinishReason, Store, Usage
from bus.store.keys import GROUP, Keys
from tests.bus.conftest import LossyLine

Expire = Callable[[], Awaitable[None]]
Entries = Callable[[str], Awaitable[list[dict[str, str]]]]

NO_WAIT_MS = 1
STOP = End(FinishReason.STOP, usage=Usage(prompt_tokens=3, completion_tokens=2))


async def take(store: Store, edge: str = "edge-1") -> Claim:
    claim = await store.queue.take(edge, NO_WAIT_MS)
    assert claim is not None
    return claim


async def submitted(store: Store, prompt: str = "Hello", **options: Any) -> str:
    return await store.queue.submit(new_request(prompt, **options))


async def request_hash(redis: Any, keys: Keys, request_id: str) -> dict[str, str]:
    stored: dict[bytes, bytes] = await redis.hgetall(keys.request(request_id))
    return {name.decode(): value.decode() for name, value in stored.items()}


# --- submitting ---------------------------------------------------------------------------------


async def test_a_request_arrives_as_it_was_submitted(store: Store, redis: Any, keys: Keys) -> None:
    request = new_request("Grüße", temperature=0.8, stop=["a"], client="me")
    assert await store.queue.submit(request) == request.id
    assert (await request_hash(redis, keys, request.id))["state"] == "queued"
    claim = await take(store)
    assert claim.request == request
    assert claim.problem is None
    assert (claim.request_id, claim.term, claim.deliveries) == (request.id, 1, 1)
    assert (claim.streamed_tokens, claim.streamed_text) == ((), "")
    known = await request_hash(redis, keys, request.id)
    assert known.items() >= {
        "owner": "edge-1", "term": "1", "next": "0", "state": "running",
        "seed": str(request.seed), "entry": claim.entry_id, "deliveries": "1",
    }.items()  # fmt: skip


async def test_a_plain_xadd_is_enough(store: Store, redis: Any, keys: Keys) -> None:
    entry_id = (await redis.xadd(keys.prompts, {"prompt": "Hello"})).decode()
    claim = await take(store)
    assert claim.request is not None
    assert claim.request_id == claim.request.id == entry_id
    assert claim.request.seed == seed_from_id(entry_id)


async def test_a_full_queue_refuses_and_trims_nothing(bus_settings: BusSettings) -> None:
    store = await Store.connect(bus_settings.model_copy(update={"max_queue": 2}))
    first = await submitted(store)
    await submitted(store)
    with pytest.raises(QueueFullError, match="holds 2 requests, the limit is 2"):
        await submitted(store)
    claim = await take(store)  # a running request still counts …
    assert claim.request_id == first
    with pytest.raises(QueueFullError):
        await submitted(store)
    await store.queue.finish(claim, STOP)  # … a finished one does not
    await submitted(store)
    await store.close()


async def test_an_id_is_used_once(store: Store) -> None:
    request = new_request("Hello")
    await store.queue.submit(request)
    with pytest.raises(RequestError, match=r"in use \(queued\)"):
        await store.queue.submit(request)
    await store.queue.finish(await take(store), STOP)
    with pytest.raises(RequestError, match=r"in use \(done\)"):
        await store.queue.submit(request)
    assert (await store.queue.depth()).length == 0


async def test_a_lost_reply_to_submit_queues_once(lossy: tuple[LossyLine, Store]) -> None:
    line, store = lossy
    await submitted(store)  # the script is known from here on
    line.lose_next_reply = True
    await submitted(store)
    assert line.num_lost == 1
    assert (await store.queue.depth()).length == 2


async def test_a_foreign_request_with_a_used_id_touches_nothing_of_the_first(
    store: Store, redis: Any, keys: Keys, entries_of: Entries
) -> None:
    for prompt in ("one", "two"):
        await redis.xadd(keys.prompts, {"prompt": prompt, "id": "same"})
    one, two = await take(store), await take(store, "edge-2")
    assert one.request_id == "same"
    assert one.problem is None
    assert two.request_id == two.entry_id
    assert two.request is None
    assert "'same' is in use" in str(two.problem)
    await store.queue.refuse(two)
    assert await entries_of(keys.result("same")) == []
    await store.results.append(one, 0, [5], [True], "x")


# --- taking -------------------------------------------------------------------------------------


async def test_concurrent_takers_never_get_the_same_entry(store: Store) -> None:
    ids = {await submitted(store) for _ in range(30)}

    async def taker(edge: str) -> list[str]:
        taken = []
        while (claim := await store.queue.take(edge, NO_WAIT_MS)) is not None:
            taken.append(claim.request_id)
        return taken

    lists = await asyncio.gather(*(taker(f"edge-{i}") for i in range(6)))
    everything = [request_id for taken in lists for request_id in taken]
    assert len(everything) == 30
    assert set(everything) == ids


async def test_concurrent_takers_of_one_idle_entry(store: Store, expire_leases: Expire) -> None:
    await submitted(store)
    await take(store)
    await expire_leases()
    claims = await asyncio.gather(*(store.queue.take(f"edge-{i}", NO_WAIT_MS) for i in range(2, 8)))
    (winner,) = [claim for claim in claims if claim is not None]
    assert winner.term == 2


async def test_take_waits_for_a_prompt(store: Store) -> None:
    await store.queue.ensure_group()
    waiting = asyncio.create_task(store.queue.take("edge-1", 5000))
    await asyncio.sleep(0)
    request_id = await submitted(store)
    claim = await waiting
    assert claim is not None
    assert claim.request_id == request_id


async def test_an_entry_read_but_never_claimed_costs_no_delivery(
    store: Store, redis: Any, keys: Keys, expire_leases: Expire
) -> None:
    await store.queue.ensure_group()
    await submitted(store)
    await redis.xreadgroup(GROUP, "edge-1", {keys.prompts: ">"})  # and edge-1 dies here
    assert await store.queue.take("edge-2", NO_WAIT_MS) is None
    await expire_leases()
    claim = await take(store, "edge-2")
    assert (claim.term, claim.deliveries) == (1, 1)


async def test_a_claim_that_comes_too_late_is_refused(
    store: Store, redis: Any, keys: Keys, expire_leases: Expire
) -> None:
    """edge-1 read the entry and slept; edge-2 claimed it before edge-1 went on."""
    await store.queue.ensure_group()
    await submitted(store)
    ((_, ((entry_id, _),)),) = await redis.xreadgroup(GROUP, "edge-1", {keys.prompts: ">"})
    await expire_leases()
    owner = await take(store, "edge-2")
    assert await store.queue._claim("edge-1", entry_id) is None
    await store.results.append(owner, 0, [1], [True], "x")
    await store.queue.finish(owner, STOP)
    assert await store.queue._claim("edge-1", entry_id) is None


async def test_many_living_leases_do_not_hide_an_idle_one(
    store: Store, redis: Any, keys: Keys
) -> None:
    for _ in range(39):  # XAUTOCLAIM looks at ten entries for each it may return
        await submitted(store)
        await take(store)
    await submitted(store)
    last = await take(store)
    await redis.xclaim(keys.prompts, GROUP, "edge-1", 0, [last.entry_id], idle=60_000)
    assert (await take(store, "edge-2")).request_id == last.request_id


async def test_a_silent_owner_is_replaced_and_its_tokens_are_kept(
    store: Store, impatient: Store
) -> None:
    request_id = await submitted(store)
    old = await take(store)
    await store.results.append(old, 0, [11], [True], "Go", probe="a1")
    await store.results.append(old, 1, [12], [False], "od ", probe="a1")
    await store.results.append(old, 2, [13], [False], "day", probe="b2")
    await store.results.append(old, 3, [], [], "")
    new = None
    while new is None:  # until the 50 ms are over
        new = await impatient.queue.take("edge-2", 10)
    assert new.request_id == request_id
    assert (new.term, new.deliveries) == (2, 2)
    assert new.streamed_tokens == (11, 12, 13)
    assert new.streamed_text == "Good day"
    assert new.streamed_probes == ("a1", "b2")
    assert new.request == old.request
    await impatient.results.append(new, 3, [14], [True], "!")


async def test_the_result_is_believed_where_the_hash_is_lost(
    store: Store, redis: Any, keys: Keys, expire_leases: Expire
) -> None:
    request_id = await submitted(store)
    old = await take(store)
    await store.results.append(old, 0, [11, 12], [True, False], "Good ")
    await redis.delete(keys.request(request_id))
    await expire_leases()
    new = await take(store, "edge-2")
    assert new.term == 2
    await store.results.append(new, 2, [13], [True], "day")
    with pytest.raises(OwnershipLostError):
        await store.results.append(old, 2, [13], [True], "day")


async def test_bad_fields_come_as_a_problem_and_end_as_an_error(
    store: Store, redis: Any, keys: Keys, entries_of: Entries
) -> None:
    entry_id = await redis.xadd(
        keys.prompts, {"prompt": b"caf\xe9", "temperature": "NaN", "id": "no spaces"}
    )
    claim = await take(store)
    assert claim.request is None
    assert claim.request_id == entry_id.decode()
    assert not claim.given_up
    for name in ("prompt: not UTF-8", "temperature: expected a finite", "id: expected"):
        assert name in str(claim.problem)
    await store.queue.refuse(claim)
    (end,) = await entries_of(keys.result(claim.request_id))
    assert (end["kind"], end["finish_reason"], end["error"]) == ("end", "error", claim.problem)
    assert await entries_of(keys.dead) == []
    assert (await store.queue.depth()).length == 0


async def test_a_foreign_entry_in_a_result_is_a_problem_not_a_crash(
    store: Store, redis: Any, keys: Keys
) -> None:
    request_id = await submitted(store)
    await redis.xadd(keys.result(request_id), {"hello": "there"})
    claim = await take(store)
    assert claim.request is None
    assert "cannot be read" in str(claim.problem)
    await store.queue.refuse(claim)


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
    await store.queue.cancel(running)  # too late: nothing is left behind
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
