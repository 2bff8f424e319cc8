"""A cloud worker given garbage, failures, too many sessions and idle ones."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio

from bus.protocol.arrays import pack_tokens
from bus.protocol.codec import AnyMessage
from bus.protocol.messages import (
    Ack,
    CloseSession,
    ControlUpdate,
    Fault,
    FaultCode,
    Message,
    SessionClosed,
    SessionReady,
    WindowReport,
)
from bus.runtime.worker import Lifecycle
from bus.store import Store
from cloud_worker import afterwards, server
from cloud_worker.session import CloudSession
from decoding import cloud
from decoding.cloud_events import Prefilled, RowsReady, WindowArrived
from engines.torch.target import TargetModel
from tests.cloud_worker.conftest import (
    PATIENCE_S,
    PROMPT,
    Start,
    opening,
    own_text,
    window,
)
from tests.sessions import drafted_rows

# --- garbage ----------------------------------------------------------------------------------


async def test_garbage_frames_are_counted_and_harm_nobody(
    start: Start, target: TargetModel
) -> None:
    house = start()
    await house.opens(target)
    frames = [b"", b"\xff" * 100, b"\x91" * 2000, b"\x93\x01\x02", b"\x92\x02\x03", bytes(10_000)]
    with zmq.asyncio.Context() as context, context.socket(zmq.PUSH) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(house.worker.endpoint)
        for frame in frames:
            await stranger.send(frame)
        await house.until(lambda: house.counters["bad_frames"] == len(frames))
    await house.answers_truly(target)


async def test_messages_that_belong_elsewhere_are_counted(
    start: Start, target: TargetModel
) -> None:
    house = start()
    house.outbox.send(ControlUpdate("s1", 1, 1, 0.1, 4, 0.0, 0.0))
    house.outbox.send(SessionReady("s1", 1, "cloud-9", 7))
    await house.until(lambda: house.counters["unexpected_messages"] == 2)
    await house.answers_truly(target)


async def test_valid_messages_in_any_order_harm_nobody(start: Start, target: TargetModel) -> None:
    """A thousand of them, about three sessions, with numbers that fit now and then."""
    house = start(max_sessions=3, evict_idle_s=0.0)
    draw = np.random.default_rng(3)

    def some(most: int) -> int:
        return int(draw.integers(0, most))

    alone = own_text(target, 4)

    def any_handle() -> int:
        known = sorted(house.worker._handles)
        return known[some(len(known))] if known and some(8) else some(9)

    def any_message() -> Message:
        session, incarnation = f"s{some(3)}", some(3)
        committed = tuple(int(t) for t in draw.integers(0, 290, some(4)))
        match some(4):
            case 0:
                return CloseSession(session, incarnation, "")
            case 1:
                return opening(
                    target, session=session, incarnation=incarnation,
                    committed=pack_tokens(committed), method=("sd", "auto", "e2sci")[some(3)],
                    temperature=(0.0, 1.0, 1e-3, 100.0)[some(4)], top_k=some(3),
                    top_p=(1.0, 0.5, 1e-9)[some(3)],
                )  # fmt: skip
            case 2:
                return Ack(any_handle(), some(5), len(PROMPT) + some(4), bool(some(2)))
            case _:
                tokens = tuple(int(t) for t in draw.integers(0, 290, 1 + some(4)))
                after = alone[: some(4)]
                return window(
                    any_handle(), tokens, after, number=some(5),
                    start=len(PROMPT) + (len(after) if some(4) else some(9)),
                    rows=drafted_rows(tokens) if some(2) else None,
                )  # fmt: skip

    for _ in range(20):
        for _ in range(50):
            house.outbox.send(any_message())
        await asyncio.sleep(0.01)
    await house.answers_truly(target)
    assert house.counters["failed_jobs"] == house.counters["impossible_events"] == 0


async def test_a_model_that_fails_ends_its_session_only(
    start: Start, target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = start()
    handle = await house.opens(target)
    with monkeypatch.context() as broken:

        def failing(*_: Any) -> Any:
            raise RuntimeError("out of memory")

        broken.setattr(target, "run", failing)
        fault = await house.ask(window(handle, (7, 9)), Fault, code=FaultCode.MODEL_FAILED)
    assert "out of memory" in fault.detail
    assert house.counters["failed_jobs"] >= 1
    assert house.reported(SessionClosed)[0].reason == "failed"
    await house.answers_truly(target)


async def test_an_engine_that_cannot_open_leaves_no_session_behind(
    start: Start, target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left half open, it would take a place until it expires, and every message would fail."""
    house = start(max_sessions=1, evict_idle_s=1000.0)
    with monkeypatch.context() as broken:

        def failing(*_: Any) -> Any:
            raise RuntimeError("out of memory")

        broken.setattr(target, "open", failing)
        fault = await house.ask(opening(target), Fault)
    assert (fault.code, fault.session) == (FaultCode.MODEL_FAILED, "s1")
    assert "out of memory" in fault.detail
    assert house.counters["failed_messages"] == 0
    await house.answers_truly(target)


async def test_a_message_that_cannot_be_handled_ends_its_session_only(
    start: Start, target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = start()
    handle = await house.opens(target)
    post = CloudSession.post

    def failing(session: CloudSession, event: Any) -> None:
        if session.state.session == "s1":
            raise LookupError("a bug")
        post(session, event)

    monkeypatch.setattr(CloudSession, "post", failing)
    fault = await house.ask(window(handle, (7, 9)), Fault, code=FaultCode.MODEL_FAILED)
    assert fault.detail == "the target failed: a bug"
    await house.answers_truly(target)


@pytest.mark.parametrize("event", [WindowArrived, RowsReady])
async def test_a_step_that_raises_on_the_model_thread_ends_its_session_only(
    start: Start, target: TargetModel, monkeypatch: pytest.MonkeyPatch, event: type[Any]
) -> None:
    house = start()
    writing = await house.opens(target, session="s2", method="auto", max_new_tokens=40)
    handle = await house.opens(target)
    step = cloud.step

    def failing(state: cloud.CloudState, arrived: Any) -> Any:
        if state.session == "s1" and isinstance(arrived, event):
            raise LookupError("a bug")
        return step(state, arrived)

    monkeypatch.setattr(cloud, "step", failing)
    fault = await house.ask(window(handle, (7, 9)), Fault, code=FaultCode.MODEL_FAILED)
    assert (fault.session, fault.detail) == ("s1", "the target failed: a bug")
    assert [(m.session, m.reason) for m in house.reported(SessionClosed)] == [("s1", "failed")]
    assert await house.reads(writing, 40) == own_text(target, 40)


async def test_an_impossible_event_is_counted_and_survived(
    start: Start, target: TargetModel, caplog: pytest.LogCaptureFixture
) -> None:
    house = start()
    handle = await house.opens(target)
    house.session().post(Prefilled(99, 0.0))
    await house.until(lambda: house.counters["impossible_events"] == 1)
    assert "Prefilled of job 99" in caplog.text
    assert "OpenSession" in caplog.text  # the story
    alone = own_text(target, 3)
    assert (await house.judges(window(handle, alone[:2]))).token_ids == alone


async def test_an_older_life_is_told_so_and_does_not_keep_the_session_alive(
    start: Start, target: TargetModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "EXPIRY_CHECK_S", 0.01)
    house = start(session_ttl_s=0.3)
    old = await house.opens(target, incarnation=7)
    await house.opens(target, incarnation=9)
    fault = await house.ask(opening(target, incarnation=8, edge="edge-2"), Fault, edge="edge-2")
    assert fault.code is FaultCode.STALE_INCARNATION
    assert "incarnation 8 is older than 9" in fault.detail
    lifecycle = Lifecycle(house.worker._settings, store, house.record)
    watching = asyncio.create_task(house.worker.watch(lifecycle))

    def asked_in_vain() -> bool:
        house.outbox.send(opening(target, incarnation=8, edge="edge-2"))
        house.outbox.send(window(old, (7, 9)))
        house.outbox.send(Ack(old, 9, len(PROMPT)))
        return bool(house.reported(SessionClosed))

    await house.until(asked_in_vain)
    assert house.reported(SessionClosed)[0].reason == "expired"
    watching.cancel()


async def test_a_report_that_waits_is_sent_before_the_end(
    start: Start, target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it, it would open the session anew at the controller."""
    monkeypatch.setattr(afterwards, "DELAY_S", 1000.0)
    house = start()
    handle = await house.opens(target)
    await house.until(lambda: not house.session().busy)
    await house.judges(window(handle, own_text(target, 2)))
    await house.until(lambda: house.session()._afterwards._calls)  # feedback leaves before
    assert house.reported(WindowReport) == []
    house.worker._drop(house.session(), "length")
    assert [type(report) for report in house.controller.reports[-2:]] == [
        WindowReport, SessionClosed,
    ]  # fmt: skip


async def test_places_are_given_in_the_order_of_asking(start: Start, target: TargetModel) -> None:
    house = start(max_sessions=1, evict_idle_s=1000.0)
    await house.opens(target)
    for name in ("s2", "s3"):
        await house.ask(opening(target, session=name), Fault, session=name)
    house.outbox.send(CloseSession("s1", 1, "length"))
    fault = await house.ask(opening(target, session="s3"), Fault, session="s3")
    assert "0 sessions are open, 2 wait" in fault.detail
    await house.opens(target, session="s2")
    house.outbox.send(CloseSession("s3", 1, "cancelled"))
    house.outbox.send(CloseSession("s2", 1, "length"))
    await house.opens(target, session="s4")


# --- number and age of sessions ---------------------------------------------------------------


async def test_a_full_worker_sends_edges_elsewhere(start: Start, target: TargetModel) -> None:
    house = start(max_sessions=1, evict_idle_s=1000.0)
    await house.opens(target)
    fault = await house.ask(opening(target, session="s2"), Fault)
    assert (fault.session, fault.code) == ("s2", FaultCode.OVERLOADED)
    await house.ask(opening(target), SessionReady)  # the one it has goes on


async def test_a_full_worker_frees_the_session_idle_for_longest(
    start: Start, target: TargetModel
) -> None:
    house = start(max_sessions=2, evict_idle_s=0.0)
    used, idle = [await house.opens(target, session=name) for name in ("s1", "s2")]
    await house.judges(window(used, own_text(target, 2)))
    await house.until(lambda: not house.session("s2").busy)
    await house.opens(target, session="s3")
    assert house.counters["evictions"] == 1
    assert [(m.session, m.reason) for m in house.reported(SessionClosed)] == [("s2", "evicted")]
    fault = await house.ask(window(idle, own_text(target, 2)), Fault, handle=idle)
    assert fault.code is FaultCode.UNKNOWN_SESSION


async def test_a_closed_session_is_freed_but_not_by_an_older_life_of_its_own(
    start: Start, target: TargetModel
) -> None:
    house = start(max_sessions=1, evict_idle_s=1000.0)
    await house.opens(target, incarnation=5)
    house.outbox.send(CloseSession("s1", 4, "late"))
    house.outbox.send(CloseSession("unknown", 4, "late"))
    fault = await house.ask(opening(target, session="s2"), Fault)
    assert fault.code is FaultCode.OVERLOADED
    house.outbox.send(CloseSession("s1", 5, "length"))
    await house.opens(target, session="s2")
    assert [(m.session, m.reason) for m in house.reported(SessionClosed)] == [("s1", "length")]


async def test_messages_of_an_older_life_are_counted_and_logged_once(
    start: Start, target: TargetModel, caplog: pytest.LogCaptureFixture
) -> None:
    house = start()
    old = await house.opens(target, incarnation=4)
    current = await house.opens(target, incarnation=5)
    for _ in range(3):
        house.outbox.send(window(old, (7, 9)))
    house.outbox.send(Ack(old, 1, len(PROMPT), again=True))
    house.outbox.send(CloseSession("s1", 4, "late"))
    await house.until(lambda: house.counters["stale_messages"] == 5)
    lines = [line for line in caplog.messages if "is ignored, 5 runs here" in line]
    assert len(lines) == 1
    assert "a DraftWindow of an older incarnation" in lines[0]
    await house.opens(target, incarnation=6)
    house.outbox.send(Ack(current, 1, len(PROMPT)))
    await house.until(lambda: any("is ignored, 6 runs here" in line for line in caplog.messages))
    assert house.session().state.tokens == PROMPT
    await house.answers_truly(target)


async def test_with_its_session_all_of_its_handles_are_forgotten(
    start: Start, target: TargetModel
) -> None:
    house = start()
    handles = [await house.opens(target, incarnation=number) for number in (1, 2, 3)]
    other = await house.opens(target, session="s2")
    house.outbox.send(CloseSession("s1", 3, "length"))
    await house.until(lambda: house.reported(SessionClosed))
    assert set(house.worker._handles) == {other}
    for handle in handles:
        fault = await house.ask(window(handle, (7,)), Fault, handle=handle)
        assert fault.code is FaultCode.UNKNOWN_SESSION
    assert house.counters["stale_messages"] == 0


@pytest.mark.parametrize("method", ["sd", "auto"])
async def test_a_session_may_be_closed_while_its_pass_runs(
    start: Start, target: TargetModel, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    house = start()
    runs, may_end, run = threading.Event(), threading.Event(), target.run

    def slow(batch: Any) -> Any:
        runs.set()
        assert may_end.wait(PATIENCE_S)
        return run(batch)

    other = await house.hears(target)
    with monkeypatch.context() as slowed:
        slowed.setattr(target, "run", slow)
        await house.opens(target, method=method)
        await house.until(runs.is_set)
        house.outbox.send(CloseSession("s1", 1, "cancelled"))
        await house.until(lambda: house.reported(SessionClosed))
        house.heard["edge-1"].clear()
        may_end.set()
        await house.worker._thread.call(lambda: None)
    assert set(house.worker._handles) == {other}
    assert not house.worker._scheduler._work
    await house.answers_truly(target)
    assert house.counters["failed_jobs"] == house.counters["impossible_events"] == 0
    assert not [m for m in house.heard["edge-1"] if getattr(m, "session", "") == "s1"]


async def test_sessions_nobody_uses_expire(
    start: Start, target: TargetModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "EXPIRY_CHECK_S", 0.01)
    house = start(session_ttl_s=0.2)
    await house.opens(target)
    lifecycle = Lifecycle(house.worker._settings, store, house.record)
    watching = asyncio.create_task(house.worker.watch(lifecycle))
    await house.until(lambda: house.reported(SessionClosed))
    assert house.reported(SessionClosed)[0].reason == "expired"
    await house.until(lambda: lifecycle.record.counters.get("expired_sessions") == 1)
    assert lifecycle.record.load == 0
    watching.cancel()


async def test_a_worker_that_leaves_tells_its_edges_and_takes_nobody_new(
    start: Start, target: TargetModel
) -> None:
    house = start()
    await house.opens(target)
    house.heard["edge-1"].clear()
    await house.worker.drain(PATIENCE_S)
    await house.until(
        lambda: any(
            isinstance(m, Fault) and m.code is FaultCode.OVERLOADED for m in house.heard["edge-1"]
        )
    )
    assert house.reported(SessionClosed)[0].reason == "worker left"
    fault = await house.ask(opening(target, session="s2"), Fault)
    assert (fault.code, fault.detail) == (FaultCode.OVERLOADED, "leaving")


def test_messages_are_what_the_codec_knows() -> None:
    assert isinstance(window(1, (1,)), AnyMessage)
