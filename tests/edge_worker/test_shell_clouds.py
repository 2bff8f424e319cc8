"""The edge worker and cloud workers that are full, fail, forget, lapse or leave."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from bus.protocol.messages import (
    CloseSession,
    FinishReason,
)
from bus.protocol.requests import session_id
from bus.store import Store
from edge_worker.server import REOPENS_PER_TERM
from tests.edge_worker.shell import Drafter, House

METHODS = pytest.mark.parametrize("method", ["sd", "auto"])


async def test_three_prompts_for_one_place_are_answered_in_order_with_few_opens(
    house: House,
) -> None:
    house.cloud(pass_s=0.005, max_sessions=1, evict_idle_s=1000.0)
    house.start()
    names = ["r1", "r2", "r3"]
    for name in names:
        await house.submit(name, max_new_tokens=120)
    answers = await asyncio.gather(*map(house.answer, names))
    for name, (tokens, _, _) in zip(names, answers, strict=True):
        assert tokens == house.expected(name, 120)
    assert house.ended == names
    assert len(house.opens()) <= 60


async def test_a_full_worker_is_left_for_one_with_room_and_its_row_too(house: House) -> None:
    full = house.cloud("cloud-1", pass_s=0.05, max_sessions=1, evict_idle_s=1000.0)
    house.start()
    await house.submit("r1", max_new_tokens=100)
    await house.until(house.opens)
    await house.submit("r2")
    await house.until(lambda: full.sockets.counters["faults"])
    house.cloud("cloud-2")
    assert (await house.answer("r2"))[0] == house.expected("r2")
    assert house.ended == ["r2"]
    assert (session_id("r2"), "elsewhere") in {(c.session, c.reason) for c in house.closes()}
    assert (await house.answer("r1"))[0] == house.expected("r1", 100)


async def test_a_session_that_waits_for_a_place_can_be_cancelled(house: House) -> None:
    house.cloud(pass_s=0.02, max_sessions=1, evict_idle_s=1000.0)
    house.start()
    await house.submit("r1", max_new_tokens=200)
    await house.until(house.opens)
    await house.submit("r2")
    await house.until(lambda: {m.session for m in house.opens()} >= {session_id("r2")})
    await house.store.queue.cancel("r2")
    assert (await house.answer("r2"))[2].end.finish_reason is FinishReason.CANCELLED
    await house.store.queue.cancel("r1")
    await house.answer("r1")
    await house.answers("r3")


@METHODS
async def test_where_the_target_fails_the_answer_goes_on_elsewhere(
    house: House, method: str
) -> None:
    failing = house.cloud("cloud-1")
    house.start()

    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    failing.target.run = out_of_memory
    await house.submit("r1", method=method)
    await house.until(lambda: failing.sockets.counters["failed_jobs"])
    house.cloud("cloud-2")
    assert (await house.answer("r1"))[0] == house.expected("r1")


async def test_where_the_target_fails_again_and_again_the_user_is_told(house: House) -> None:
    failing = house.cloud()
    house.start()

    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    failing.target.open = out_of_memory
    await house.fails("r1", "model_failed: the target failed: out of memory")
    assert failing.sockets.counters["failed_jobs"] <= 10
    del failing.target.open
    await house.answers("r2")


@METHODS
async def test_a_worker_that_forgot_a_session_gets_it_again(house: House, method: str) -> None:
    """Its fault goes to everybody; the session beside it, of the same worker, is not meant."""
    cloud = house.cloud(pass_s=0.06)  # the answers go on until the last of it
    house.start()
    stranger = house.sockets.outbox(cloud.worker.endpoint)
    for name in ("r1", "r2"):
        await house.submit(name, max_new_tokens=100, method=method)
    for opened in (1, 2, 3):
        await house.until(lambda: session_id("r1") in cloud.worker._sessions)
        stranger.send(CloseSession(session_id("r1"), 2**31 - 1, "a stranger's"))
        await house.until(lambda: len(incarnations(house, "r1")) > opened)  # noqa: B023
    cloud.target.pass_s = 0.0
    for name in ("r1", "r2"):
        assert (await house.answer(name))[0] == house.expected(name, 100)
    assert len(incarnations(house, "r1")) == 4
    assert len(incarnations(house, "r2")) == 1


def incarnations(house: House, name: str) -> set[int]:
    """Those under which its session has been opened."""
    return {m.incarnation for m in house.opens() if m.session == session_id(name)}


async def test_a_heartbeat_that_lapses_takes_no_worker_from_running_sessions(
    house: House,
) -> None:
    lapsing = house.cloud("cloud-1", pass_s=0.01)
    house.start()
    await house.submit("r1", max_new_tokens=100)
    await house.until(house.opens)
    await lapsing.lapse()
    house.cloud("cloud-2")
    await house.answers("r2")  # its search finds cloud-1 gone
    assert (await house.answer("r1"))[0] == house.expected("r1", 100)
    assert house.sockets.counters["dropped_sends"] == 0
    assert {m.incarnation % 4096 for m in house.opens() if m.session == session_id("r1")} == {1}


@METHODS
async def test_a_worker_that_leaves_hands_its_sessions_on(house: House, method: str) -> None:
    leaving = house.cloud("cloud-1", pass_s=0.01)
    house.start()
    await house.submit("r1", max_new_tokens=100, method=method)
    await house.until(house.opens)
    await asyncio.sleep(0.1)
    house.cloud("cloud-2")
    await leaving.lapse()
    await leaving.worker.drain(5.0)
    assert (await house.answer("r1"))[0] == house.expected("r1", 100)


async def test_a_successor_goes_on_at_once_however_often_the_session_was_opened(
    house: House, store: Store
) -> None:
    """The owner before used all of its incarnations, and the cloud still holds its session."""
    cloud = house.cloud()
    await house.submit("r1")
    claim = await store.queue.take("edge-0", 1000)
    assert claim is not None
    house.start()
    await house.answers("r0")
    template = house.opens()[0]
    last = (claim.term + 1) * REOPENS_PER_TERM - 1
    old = msgspec.structs.replace(
        template, session=session_id("r1"), edge="edge-0", incarnation=last
    )
    house.sockets.outbox(cloud.worker.endpoint).send(old)
    await house.until(lambda: cloud.lifecycle.record.load == 1)
    await store.queue.release(claim)
    assert (await house.answer("r1"))[0] == house.expected("r1")
    opens = [m for m in house.opens() if (m.session, m.edge) == (session_id("r1"), "edge-1")]
    assert len({m.incarnation for m in opens}) == 1
    assert opens[0].incarnation > last


async def test_an_owner_whose_incarnations_are_refused_is_told_and_says_so(
    house: House, store: Store
) -> None:
    cloud = house.cloud()
    house.start()
    await house.answers("r0")
    newer = msgspec.structs.replace(
        house.opens()[0], session=session_id("r1"), edge="edge-9", incarnation=2**30
    )
    house.sockets.outbox(cloud.worker.endpoint).send(newer)
    await house.until(lambda: cloud.lifecycle.record.load == 1)
    await house.fails("r1", "another edge worker has taken the request over")
    assert len([m for m in house.opens() if m.session == session_id("r1")]) <= 8


async def test_only_workers_of_another_tokenizer_are_an_error(house: House) -> None:
    house.cloud()
    house.start(Drafter(tokenizer_digest="another"), peer_wait_s=0.3)
    await house.fails("r1", "no cloud worker shares the draft's tokenizer")
