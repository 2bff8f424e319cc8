"""The queue on a real Valkey: who may take, keep, hand back and end a request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bus.protocol.errors import OwnershipLostError, QueueFullError, RequestError
from bus.protocol.requests import new_request, seed_from_id
from bus.settings import BusSettings
from bus.store import Store
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


async def test_a_plain_xadd_names_its_coupling(store: Store, redis: Any, keys: Keys) -> None:
    await redis.xadd(keys.prompts, {"prompt": "Hello"})
    await redis.xadd(keys.prompts, {"prompt": "Hello", "coupling": "residual"})
    found = [(await take(store)).request for _ in range(2)]
    assert [request and request.coupling for request in found] == ["gumbel", "residual"]
    await redis.xadd(keys.prompts, {"prompt": "Hello", "coupling": "magic"})
    claim = await take(store)
    assert claim.request is None
    assert "coupling: " in str(claim.problem)


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
