"""The edge worker with toy engines, over real sockets and a real Valkey: whatever goes wrong ends
one session with an error its user can read; the worker and its other sessions go on."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bus.protocol.messages import (
    CloseSession,
    ControlUpdate,
    Fault,
    FaultCode,
    FinishReason,
    SessionReady,
)
from bus.protocol.requests import session_id
from bus.settings import BusSettings
from bus.store import Keys, Store, WindowEntry, stories
from bus.store.keys import GROUP
from edge_worker.server import REOPENS_PER_TERM, serve
from edge_worker.settings import EdgeSettings
from tests.edge_worker.shell import Drafter, House, ToyTokenizer
from tests.engines.tiny import save_tiny


@pytest.fixture
async def house(store: Store, bus_settings: BusSettings) -> AsyncIterator[House]:
    house = House(store, bus_settings)
    yield house
    await house.stop()
    assert house.sockets.counters["impossible_events"] == 0
    assert house.drafter.open_caches == 0, "every cache is given back"


async def test_answers_are_the_targets_own(house: House) -> None:
    house.cloud()
    house.start()
    await asyncio.gather(*(house.answers(f"r{i}") for i in range(5)))


async def fails(house: House, name: str, text: str, **fields: Any) -> None:
    await house.submit(name, **fields)
    _, _, end = await house.answer(name)
    assert end.end.finish_reason is FinishReason.ERROR
    assert text in end.end.error


# --- what an engine or a callback raises ------------------------------------------------------


def broken(drafter: Drafter, name: str, text: str) -> Callable[[], None]:
    """One method of the drafter raises, until the returned function is called."""

    def raises(*_: Any, **__: Any) -> Any:
        raise RuntimeError(text)

    setattr(drafter, name, raises)
    return lambda: delattr(drafter, name)


@pytest.mark.parametrize(
    ("method", "why"),
    [("open", "internal error in the edge worker"), ("draft", "the draft failed: no memory")],
)
async def test_an_engine_that_raises_ends_its_session_only(
    house: House, method: str, why: str
) -> None:
    house.cloud()
    house.start()
    mend = broken(house.drafter, method, "no memory")
    await fails(house, "r1", why)
    mend()
    await house.answers("r2")


async def test_a_tokenizer_that_raises_while_it_streams_ends_its_session_only(
    house: House,
) -> None:
    """It is called a turn of the loop after the verdict, where nobody waits for it."""
    house.cloud()
    house.start()

    class Broken(ToyTokenizer):
        def decode(self, tokens: Any, **_: Any) -> str:
            raise RuntimeError("no such letter")

    whole, house.drafter.tokenizer = house.drafter.tokenizer, Broken()
    await fails(house, "r1", "no such letter")
    house.drafter.tokenizer = whole
    await house.answers("r2")


async def test_a_message_that_cannot_be_handled_silences_nobody_else(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions share a peer's listener: what one of them raises there must not end it."""
    house.cloud(pass_s=0.01)
    house.start()
    poisoned = session_id("r1")
    on_message = house.edge.on_message

    def poison(message: Any) -> None:
        if message.session == poisoned and not isinstance(message, SessionReady):
            raise LookupError("a bug")
        on_message(message)

    monkeypatch.setattr(house.edge, "on_message", poison)
    await asyncio.gather(
        fails(house, "r1", "a Feedback could not be handled: a bug"),
        *(house.answers(f"other-{i}") for i in range(3)),
    )
    assert house.sockets.counters["failed_messages"] >= 1


# --- a full cloud worker ----------------------------------------------------------------------


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


# --- a cloud worker that fails, forgets, lapses or goes ---------------------------------------


async def test_where_the_target_fails_the_answer_goes_on_elsewhere(house: House) -> None:
    failing = house.cloud("cloud-1")
    house.start()

    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    failing.target.run = out_of_memory
    await house.submit("r1")
    await house.until(lambda: failing.sockets.counters["failed_jobs"])
    house.cloud("cloud-2")
    assert (await house.answer("r1"))[0] == house.expected("r1")


async def test_where_the_target_fails_again_and_again_the_user_is_told(house: House) -> None:
    failing = house.cloud()
    house.start()

    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    failing.target.open = out_of_memory
    await fails(house, "r1", "model_failed: the target failed: out of memory")
    assert failing.sockets.counters["failed_jobs"] <= 10
    del failing.target.open
    await house.answers("r2")


async def test_a_worker_that_forgot_the_session_is_told_again(house: House) -> None:
    cloud = house.cloud(pass_s=0.01)
    house.start()
    stranger = house.sockets.outbox(cloud.worker.endpoint)
    await house.submit("r1", max_new_tokens=100)
    await house.until(lambda: cloud.lifecycle.record.load or house.opens())
    for _ in range(3):
        await asyncio.sleep(0.1)
        stranger.send(CloseSession(session_id("r1"), 2**31 - 1, "a stranger's"))
    assert (await house.answer("r1"))[0] == house.expected("r1", 100)


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


async def test_a_worker_that_leaves_hands_its_sessions_on(house: House) -> None:
    leaving = house.cloud("cloud-1", pass_s=0.01)
    house.start()
    await house.submit("r1", max_new_tokens=100)
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
    await fails(house, "r1", "another edge worker has taken the request over")
    assert len([m for m in house.opens() if m.session == session_id("r1")]) <= 8


# --- requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"method": "magic"}, "known methods: "),
        ({"max_new_tokens": 5000}, "the model's context holds 4096"),
    ],
)
async def test_a_request_that_cannot_be_answered_is_refused(
    house: House, fields: dict[str, Any], why: str
) -> None:
    house.cloud()
    house.start()
    await fails(house, "r1", why, **fields)
    assert house.sockets.counters["refused_requests"] == 1
    await house.answers("r2")


async def test_a_stop_string_inside_an_accepted_window_ends_what_counts_too(house: House) -> None:
    house.cloud()
    house.start()
    names = [f"r{number}" for number in range(12)]
    for name in names:
        text = ToyTokenizer().decode(house.expected(name))
        await house.submit(name, stop=(text[3:5],), method="sd:8")
    for name in names:
        text = ToyTokenizer().decode(house.expected(name))
        tokens, shown, end = await house.answer(name)
        assert end.end.finish_reason is FinishReason.STOP
        assert shown == text[: text.index(text[3:5])]
        assert tokens == house.expected(name)[: len(tokens)]
        assert end.end.usage.accepted_tokens <= end.end.usage.completion_tokens == len(tokens)
    entries = [entry for _, entry in await house.store.telemetry.read()]
    windows = [entry for entry in entries if isinstance(entry, WindowEntry)]
    assert windows
    assert all(entry.num_accepted <= entry.num_committed for entry in windows)


async def test_only_workers_of_another_tokenizer_are_an_error(house: House) -> None:
    house.cloud()
    house.start(Drafter(tokenizer_digest="another"), peer_wait_s=0.3)
    await fails(house, "r1", "no cloud worker shares the draft's tokenizer")


async def test_messages_that_belong_nowhere_are_counted(house: House) -> None:
    house.cloud(pass_s=0.05)
    house.start()
    await house.submit("r1")
    await house.until(house.opens)
    house.edge.on_message(SessionReady("another", 1, "cloud-1"))
    house.edge.on_message(CloseSession(session_id("r1"), 1, "?"))
    house.edge.on_message(ControlUpdate(session_id("r1"), 1, 1, 0.1, 5, 0.5, 0.0))
    house.edge.on_message(Fault(session_id("r1"), FaultCode.OUT_OF_ORDER, "once"))
    assert house.sockets.counters["unexpected_messages"] == 1
    assert house.sockets.counters["faults"] == 1
    assert (await house.answer("r1"))[0] == house.expected("r1")


async def test_long_texts_are_worked_on_beside_the_event_loop(house: House) -> None:
    """Tokenizing a prompt of 0.8 MB takes a second; the answers beside it must not wait."""
    house.cloud()
    house.start()
    threads = set[str]()

    class Watched(ToyTokenizer):
        def encode(self, text: str) -> list[int]:
            threads.add(threading.current_thread().name)
            return super().encode(text)

    house.drafter.tokenizer = Watched()
    await fails(house, "r1", "the model's context holds 4096", prompt="x" * 100_000)
    assert threads == {"text_0"}


async def test_the_story_of_a_session_is_there_while_it_runs_and_afterwards(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stories, "INTERVAL_S", 0.02)
    cloud = house.cloud(pass_s=0.02)
    house.start()
    await house.submit("r1", max_new_tokens=60)

    async def told(text: str) -> None:
        async with asyncio.timeout(20.0):
            while True:
                story = await house.store.stories.load(session_id("r1"))
                if set(story) == {"edge-1", "cloud-1"} and any(text in s for s in story["edge-1"]):
                    break
                await asyncio.sleep(0.01)

    await told("FeedbackArrived")
    await house.answer("r1")
    await told("running → finished")
    assert cloud.sockets.counters["impossible_events"] == 0


# --- leases and leaving -----------------------------------------------------------------------


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


async def test_a_request_that_cannot_be_read_is_refused(
    house: House, redis: Any, key_prefix: str
) -> None:
    house.cloud()
    house.start()
    fields = {"id": "r1", "prompt": "x", "temperature": "warm"}
    await redis.xadd(Keys(key_prefix).prompts, fields)
    assert "temperature" in (await house.answer("r1"))[2].end.error


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
