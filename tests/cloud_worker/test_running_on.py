"""A target that writes by itself: sessions whose method runs on, over real sockets."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from bus.protocol.arrays import pack_tokens
from bus.protocol.messages import (
    Ack,
    CloseSession,
    Feedback,
    Outcome,
    SessionClosed,
    WindowReport,
)
from bus.store import Store, stories
from engines.torch.target import TargetModel
from tests.cloud_worker.conftest import (
    PATIENCE_S,
    PROMPT,
    House,
    Start,
    own_text,
    window,
)


def limit(house: House, **changes: Any) -> None:
    """Of sessions that are opened from now on."""
    house.worker._limits = replace(house.worker._limits, **changes)


async def at_rest(house: House, num_tokens: int, session: str = "s1") -> tuple[int, ...]:
    """The session's text once it has so many tokens and asks for nothing more."""

    def rests() -> bool:
        state = house.session(session).state
        return state.stage.name == "idle" and len(state.tokens) >= len(PROMPT) + num_tokens

    await house.until(rests)
    return house.session(session).state.tokens[len(PROMPT) :]


async def test_without_windows_it_writes_within_its_lease_and_goes_on_when_acknowledged(
    start: Start, target: TargetModel
) -> None:
    house, alone = start(), own_text(target, 20)
    limit(house, lease=6)
    handle = await house.opens(target, method="auto")
    assert await at_rest(house, 6) == alone[:6]
    assert await house.reads(handle, 6) == alone[:6]  # nothing is acknowledged by that
    assert await at_rest(house, 6) == alone[:6]
    house.outbox.send(Ack(handle, 2, len(PROMPT) + 4))
    assert await at_rest(house, 10) == alone[:10]
    assert await house.reads(handle, 6, acknowledged=8) == alone[8:14]


@pytest.mark.parametrize(("changes", "num_tokens"), [({"max_new_tokens": 11}, 11), ({}, 5)])
async def test_it_stops_where_the_answer_ends(
    start: Start, target: TargetModel, changes: dict[str, Any], num_tokens: int
) -> None:
    house, alone = start(), own_text(target, 20)
    assert alone[4] not in alone[:4]
    if not changes:
        limit(house, eos=frozenset({alone[4]}))
    handle = await house.opens(target, method="auto", **changes)
    assert await at_rest(house, num_tokens) == alone[:num_tokens]
    house.outbox.send(Ack(handle, 2, len(PROMPT) + num_tokens))
    assert await house.reads(handle, num_tokens) == alone[:num_tokens]
    assert await at_rest(house, num_tokens) == alone[:num_tokens]


async def test_text_that_was_lost_is_sent_again(start: Start, target: TargetModel) -> None:
    house, alone = start(), own_text(target, 12)
    handle = await house.opens(target, method="auto", max_new_tokens=12)
    await at_rest(house, 12)
    for acknowledged in (3, 0, 7):
        text = await house.reads(handle, 12 - acknowledged, acknowledged)
        assert text == alone[acknowledged:]


def held(house: House) -> Callable[[], None]:
    """The model thread does nothing until the returned function is called."""
    may_go_on = threading.Event()
    house.worker._thread.post(lambda: assert_waited(may_go_on))
    return may_go_on.set


def assert_waited(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S)


async def test_two_sessions_have_a_row_each_in_every_pass(
    start: Start, target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, sizes, run = start(), list[list[int]](), target.run
    await house.hears(target)

    def counting(batch: Any) -> Any:
        sizes.append([len(segment.tokens) for segment in batch])
        return run(batch)

    monkeypatch.setattr(target, "run", counting)
    go_on = held(house)
    for session in ("s1", "s2"):
        await house.opens(target, session=session, method="auto", max_new_tokens=10)
    go_on()
    for session in ("s1", "s2"):
        assert await at_rest(house, 10, session) == own_text(target, 10)
    assert {len(rows) for rows in sizes} == {2}
    assert sizes[-10:] == [[1, 1]] * 10  # before them the prompts
    assert [sum(rows) for rows in zip(*sizes[:-10], strict=True)] == [len(PROMPT) - 1] * 2


async def test_passes_do_not_wait_for_the_event_loop(start: Start, target: TargetModel) -> None:
    """Between two passes the loop has nothing to do: it may be blocked."""
    house = start()
    limit(house, lease=30)
    await house.hears(target)
    go_on = held(house)
    await house.opens(target, method="auto", max_new_tokens=200)
    session, deadline_s = house.session(), time.monotonic() + PATIENCE_S
    go_on()
    while len(session.state.tokens) < len(PROMPT) + 8 or session.busy:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)  # noqa: ASYNC251 - the loop is blocked, on purpose
    written = session.state.tokens[len(PROMPT) :]
    assert 8 <= len(written) <= 30
    assert written == own_text(target, len(written))


async def test_windows_and_passes_without_them_take_turns(
    start: Start, target: TargetModel
) -> None:
    """A draft that comes while the lease is out is verified and renews it; one that comes late is
    judged by the text alone."""
    house, alone = start(), own_text(target, 20)
    limit(house, lease=4)
    handle = await house.opens(target, method="auto")
    await at_rest(house, 4)
    late = window(handle, (*alone[2:4],), alone[:2], number=1, acknowledged=len(PROMPT))
    wrong = window(handle, (alone[1], 0), alone[:1], number=2, acknowledged=len(PROMPT))
    house.outbox.send(late)
    house.outbox.send(wrong)
    await house.until(lambda: len(house.reported(WindowReport)) == 2)
    assert await at_rest(house, 4) == alone[:4]
    ahead = window(handle, alone[4:7], alone[:4], number=3)
    house.outbox.send(ahead)
    assert await at_rest(house, 8) == alone[:8]  # three drafted, and what follows them
    await house.until(lambda: len(house.reported(WindowReport)) == 3)
    judged = [
        (r.number, r.outcome, r.num_accepted, r.verify_ms > 0) for r in house.reported(WindowReport)
    ]
    assert judged == [
        (1, Outcome.ACCEPTED, 2, False), (2, Outcome.PREHIT_REJECTED, 1, False),
        (3, Outcome.ACCEPTED, 3, True),
    ]  # fmt: skip


async def test_a_worker_may_leave_while_sessions_run_on(start: Start, target: TargetModel) -> None:
    house = start()
    for session in ("s1", "s2"):
        await house.opens(target, session=session, method="auto", max_new_tokens=400)
    await house.until(lambda: len(house.session("s2").state.tokens) > len(PROMPT))
    sessions = [house.session(name) for name in ("s1", "s2")]
    await house.worker.drain(PATIENCE_S)
    reasons = [(m.session, m.reason) for m in house.reported(SessionClosed)]
    assert sorted(reasons) == [("s1", "worker left"), ("s2", "worker left")]
    await house.worker._thread.call(lambda: None)
    assert not house.worker._scheduler._work
    lengths = [len(session.state.tokens) for session in sessions]
    await house.worker._thread.call(lambda: None)
    assert [len(session.state.tokens) for session in sessions] == lengths
    assert house.worker._handles == {}


async def test_its_story_is_read_while_the_model_thread_writes_it(
    start: Start, target: TargetModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stories, "INTERVAL_S", 0.0)
    house = start()
    limit(house, lease=200)
    telling = asyncio.create_task(house.worker.tell_forever(store.stories))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        handle = await house.opens(target, method="auto", max_new_tokens=200)
        session = house.session()
        while len(session.state.tokens) < len(PROMPT) + 200:
            lines = session.story.lines()
            assert 1 <= len(lines) <= 64
            house.outbox.send(Ack(handle, 1, len(session.state.tokens)))
            await asyncio.sleep(0)
    finally:
        sys.setswitchinterval(before)
    while not any("RowsReady" in s for s in (await store.stories.load("s1")).get("cloud-1", [])):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    assert not telling.done()
    telling.cancel()


@pytest.mark.parametrize(("num_tokens", "sums"), [(6, [6]), (32, [32]), (40, [32, 8])])
async def test_passes_without_drafts_are_reported_in_sums_the_rest_at_the_end(
    start: Start, target: TargetModel, num_tokens: int, sums: list[int]
) -> None:
    house = start()
    handle = await house.opens(target, method="auto", max_new_tokens=num_tokens)
    await house.reads(handle, num_tokens)
    house.outbox.send(CloseSession("s1", 1, "length"))
    await house.until(lambda: house.reported(SessionClosed))
    reports = house.reported(WindowReport)
    assert [type(m) for m in house.controller.reports[-2:]] == [WindowReport, SessionClosed]
    assert [report.num_own for report in reports] == sums
    for report in reports:
        assert (report.outcome, report.number, report.num_drafted) == (Outcome.OWN, 0, 0)
        assert report.num_scored == report.num_greedy == report.num_own
        assert report.log_likelihood < 0 < report.verify_ms
        assert report.energy_j > 0


async def test_feedback_comes_with_each_pass(start: Start, target: TargetModel) -> None:
    house, alone = start(), own_text(target, 9)
    await house.hears(target)
    handle = await house.opens(target, method="auto", max_new_tokens=9)

    def text() -> dict[int, tuple[int, ...]]:
        heard = [m for m in house.heard["edge-1"] if isinstance(m, Feedback)]
        return {m.start: m.token_ids for m in heard if m.handle == handle}

    await house.until(lambda: len(text()) == 9)
    assert text() == {len(PROMPT) + i: (token,) for i, token in enumerate(alone)}


async def test_a_session_that_nobody_acknowledges_comes_to_rest_and_expires(
    start: Start, target: TargetModel
) -> None:
    """The lease bounds what a lost edge costs; it is busy no longer and can be evicted."""
    house = start(max_sessions=1, evict_idle_s=0.0)
    limit(house, lease=5)
    await house.opens(target, method="auto")
    await at_rest(house, 5)
    await house.opens(target, session="s2")
    assert house.counters["evictions"] == 1


async def test_a_reopened_session_goes_on_from_the_edges_text(
    start: Start, target: TargetModel
) -> None:
    """What the target has written beyond it and the edge has not heard is written again."""
    house, alone = start(), own_text(target, 12)
    await house.opens(target, method="auto", max_new_tokens=12)
    await at_rest(house, 12)
    handle = await house.opens(
        target, method="auto", max_new_tokens=12, incarnation=2, committed=pack_tokens(alone[:5])
    )
    assert await at_rest(house, 12) == alone
    assert await house.reads(handle, 7, acknowledged=5) == alone[5:]
