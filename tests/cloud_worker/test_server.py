"""The cloud worker with a tiny random model, over real sockets: answers, counters, survival."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from bench.reference import generate_alone
from bus.protocol.arrays import pack_tokens
from bus.protocol.codec import AnyMessage
from bus.protocol.messages import (
    CloseSession,
    ControlUpdate,
    DraftWindow,
    Fault,
    FaultCode,
    Feedback,
    Message,
    OpenSession,
    Outcome,
    SessionClosed,
    SessionOpened,
    SessionReady,
    WindowReport,
)
from bus.runtime.worker import Lifecycle, new_record
from bus.settings import BusSettings
from bus.store import Store
from bus.transport.sockets import Sockets
from cloud_worker import server
from cloud_worker.costs import FIRST_CHUNK
from cloud_worker.server import CloudWorker
from cloud_worker.session import CloudSession
from cloud_worker.settings import CloudSettings
from decoding.cloud_events import Prefilled
from decoding.engine import Want
from decoding.sampling import SamplingParams
from engines.thread import ModelThread
from engines.torch.target import TargetCache, TargetModel
from tests.engines.tiny import CONTEXT_LENGTH, save_tiny

PATIENCE_S = 30.0
PROMPT = (5, 17, 99, 42, 7, 120)
NEVER: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    return TargetModel.load(str(save_tiny(tmp_path_factory.mktemp("target"))), "float32", "cpu")


class Controller:
    """Takes what the worker reports."""

    def __init__(self) -> None:
        self.reports: list[Any] = []

    def report(self, message: Message) -> None:
        self.reports.append(message)


class House:
    """A running cloud worker and the edges that talk to it."""

    def __init__(self, worker: CloudWorker, settings: CloudSettings, sockets: Sockets) -> None:
        self.worker, self.sockets, self.counters = worker, sockets, sockets.counters
        self.controller: Any = worker._controller
        self.record = worker.describe(new_record(settings, "cloud"))
        self.outbox = sockets.outbox(self.record.endpoints["windows"])
        self.heard: dict[str, list[Any]] = {}
        self.tasks = [asyncio.create_task(worker.receive())]
        for edge in ("edge-1", "edge-2"):
            self.tasks.append(asyncio.create_task(self._listen(edge)))

    async def _listen(self, edge: str) -> None:
        heard = self.heard.setdefault(edge, [])
        listener = self.sockets.listener(self.record.endpoints["feedback"], edge)
        await listener.deliver(lambda message, _size: heard.append(message))

    async def ask(
        self, message: Message, kind: type[Any], edge: str = "edge-1", **expected: Any
    ) -> Any:
        """Send until an answer of this kind comes, as an edge does."""
        heard = self.heard.setdefault(edge, [])
        heard.clear()
        for _ in range(int(PATIENCE_S / 0.2)):
            self.outbox.send(message)
            for _ in range(100):
                await asyncio.sleep(0.002)
                for answer in heard:
                    if isinstance(answer, kind) and all(
                        getattr(answer, name) == value for name, value in expected.items()
                    ):
                        return answer
        raise AssertionError(f"no {kind.__name__} {expected} among {heard}")

    async def until(self, condition: Callable[[], Any]) -> None:
        async def wait() -> None:
            while not condition():  # noqa: ASYNC110 - counters notify nobody
                await asyncio.sleep(0.002)

        await asyncio.wait_for(wait(), PATIENCE_S)

    def reported(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.controller.reports if isinstance(message, kind)]

    async def answers_truly(self, target: TargetModel, session: str = "still-alive") -> None:
        """The worker lives: a new session is opened and a window of the target's own accepted."""
        await self.ask(opening(target, session=session), SessionReady, session=session)
        alone = list(generate_alone(target, list(PROMPT), SamplingParams(), 4, NEVER))
        message = window(alone[:3], session=session)
        answer = await self.ask(message, Feedback, session=session)
        assert (answer.outcome, answer.num_accepted, answer.next_token) == (
            Outcome.ACCEPTED, 3, alone[3],
        )  # fmt: skip


Start = Callable[..., House]


@pytest.fixture
async def start(
    target: TargetModel, bus_settings: BusSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Start]:
    """However its sessions end, a worker gives each one's cache back once, on the model thread."""
    houses: list[House] = []
    thread = ModelThread(1)
    begun: list[CloudSession] = []
    given_back: list[tuple[TargetCache, str]] = []

    begin = CloudSession.begin

    def recorded(session: CloudSession, *args: Any) -> None:
        begin(session, *args)
        begun.append(session)

    def close(cache: TargetCache) -> None:
        given_back.append((cache, threading.current_thread().name))

    monkeypatch.setattr(CloudSession, "begin", recorded)
    monkeypatch.setattr(target, "close", close)

    def make(**settings: Any) -> House:
        full = CloudSettings.load(
            redis_url=bus_settings.redis_url, key_prefix=bus_settings.key_prefix,
            worker_id="cloud-1", **settings,
        )  # fmt: skip
        sockets = Sockets(full)
        controller: Any = Controller()
        worker = CloudWorker(full, target, thread, sockets, controller)
        houses.append(House(worker, full, sockets))
        return houses[-1]

    yield make
    for house in houses:
        assert not any(task.done() for task in house.tasks), "the worker lives on"
        for task in house.tasks:
            task.cancel()
        await house.worker.drain(PATIENCE_S)
        house.sockets.close()
    await thread.call(lambda: None)  # what was submitted before has ended
    thread.close()
    assert {name for _, name in given_back} <= {"model"}
    assert sorted(id(c) for c, _ in given_back) == sorted(id(s.cache) for s in begun)


def opening(target: TargetModel, **changes: Any) -> OpenSession:
    plain = OpenSession(
        session="s1",
        client="c1",
        edge="edge-1",
        incarnation=1,
        epoch=0,
        next_seq=0,
        method="sd",
        prompt=pack_tokens(PROMPT),
        committed=b"",
        seed=5,
        max_new_tokens=20,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        tokenizer_digest=target.tokenizer_digest,
    )
    return msgspec.structs.replace(plain, **changes)


def window(tokens: list[int] | tuple[int, ...], **changes: Any) -> DraftWindow:
    """Each token with probability 3/4 and token 0 with 1/4."""
    others = [i for token in tokens for i in (token, 0 if token else 1)]
    plain = DraftWindow(
        session="s1",
        incarnation=1,
        epoch=0,
        seq=0,
        start=len(PROMPT),
        tokens=pack_tokens(tokens),
        q_ids=pack_tokens(others),
        q_probs=np.tile(np.array([0.75, 0.25], "<f2"), len(tokens)).tobytes(),
        threshold=0.1,
        control_version=0,
        draft_ms=6.0,
        edge_ms=26.0,
        rework_ms=3.0,
        rtt_ms=9.0,
        awaits=True,
    )
    return msgspec.structs.replace(plain, **changes)


# --- answers ----------------------------------------------------------------------------------


async def test_a_session_is_opened_and_windows_are_judged_by_the_target(
    start: Start, target: TargetModel
) -> None:
    house = start()
    assert await house.ask(opening(target), SessionReady) == SessionReady("s1", 1, "cloud-1")
    alone = list(generate_alone(target, list(PROMPT), SamplingParams(), 8, NEVER))
    answer = await house.ask(window(alone[:3]), Feedback)
    assert (answer.outcome, answer.num_accepted, answer.next_token, answer.committed_length) == (
        Outcome.ACCEPTED, 3, alone[3], len(PROMPT) + 4,
    )  # fmt: skip
    wrong = (alone[5] + 1) % target.vocab_size
    second = window((alone[4], wrong, 7), seq=1, start=len(PROMPT) + 4)
    answer = await house.ask(second, Feedback, seq=1)
    assert (answer.outcome, answer.num_accepted, answer.next_token) == (
        Outcome.PARTIAL, 1, alone[5],
    )  # fmt: skip
    third = window(alone[6:8], seq=2, epoch=1, start=len(PROMPT) + 6)
    answer = await house.ask(third, Feedback, seq=2)
    assert (answer.outcome, answer.num_accepted) == (Outcome.ACCEPTED, 2)
    assert house.reported(SessionOpened)[0].edge == "edge-1"
    await house.until(lambda: len(house.reported(WindowReport)) == 3)  # they follow a little later
    assert [report.num_drafted for report in house.reported(WindowReport)] == [3, 3, 2]


async def test_sampled_windows_end_in_a_recovered_token(start: Start, target: TargetModel) -> None:
    house = start()
    await house.ask(opening(target, temperature=1.0), SessionReady)
    cache = target.open(SamplingParams(temperature=1.0))
    target.forward(cache, PROMPT, [np.arange(3, dtype=np.int32)])
    row = target.row(cache, 0, Want(0, full=True)).full
    assert row is not None
    unlikely = int(row[2:].argmin()) + 2
    answer = await house.ask(window((unlikely, 3)), Feedback)
    assert (answer.outcome, answer.num_accepted) == (Outcome.PARTIAL, 0)
    assert answer.next_token not in (unlikely, None)
    again = await house.ask(window((unlikely, 3)), Feedback)
    assert again == answer  # from its last feedback


async def test_edges_hear_of_their_own_sessions_only(start: Start, target: TargetModel) -> None:
    house = start()
    await house.ask(opening(target), SessionReady)
    await house.ask(opening(target, session="s2", edge="edge-2"), SessionReady, "edge-2")
    assert all(message.session == "s1" for message in house.heard["edge-1"])
    assert all(message.session == "s2" for message in house.heard["edge-2"])


async def test_a_long_prompt_is_prefilled_in_chunks_and_others_interleave(
    start: Start, target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = target.run

    def counting(batch: Any) -> Any:
        sizes.extend(len(segment.tokens) for segment in batch)
        return run(batch)

    monkeypatch.setattr(target, "run", counting)
    house = start()
    prompt = tuple((7 * i) % 280 + 2 for i in range(400))
    await house.ask(
        opening(target, prompt=pack_tokens(prompt), max_new_tokens=10, session="long"), SessionReady
    )
    alone = list(generate_alone(target, list(prompt), SamplingParams(), 2, NEVER))
    answer = await house.ask(window(alone[:1], session="long", start=400), Feedback)
    assert (answer.num_accepted, answer.next_token) == (1, alone[1])
    prefill = sizes[:-1]  # the last is the window
    assert (sum(prefill), max(prefill)) == (399, FIRST_CHUNK)


async def test_a_window_of_a_session_it_does_not_know_is_answered_to_everybody(
    start: Start, target: TargetModel
) -> None:
    house = start()
    for edge in ("edge-1", "edge-2"):
        answer = await house.ask(window((1, 2), session="gone", epoch=3, seq=4), Feedback, edge)
        assert answer.outcome is Outcome.UNKNOWN_SESSION
        assert (answer.session, answer.incarnation, answer.epoch, answer.seq) == ("gone", 1, 3, 4)


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"tokenizer_digest": "another"}, FaultCode.TOKENIZER_MISMATCH, "draft of the target's"),
        ({"method": "magic"}, FaultCode.UNKNOWN_METHOD, "known: sd"),
        ({"max_new_tokens": CONTEXT_LENGTH}, FaultCode.CONTEXT_OVERFLOW, "context holds 512"),
        ({"prompt": pack_tokens((5, 100_000))}, FaultCode.BAD_TOKENS, "must lie in"),
        ({"prompt": pack_tokens((5, -1))}, FaultCode.BAD_TOKENS, "must lie in"),
        ({"committed": pack_tokens((2**31 - 1,))}, FaultCode.BAD_TOKENS, "must lie in"),
    ],
)
async def test_what_cannot_be_opened_is_refused_and_counted(
    start: Start, target: TargetModel, changes: dict[str, Any], code: FaultCode, text: str
) -> None:
    house = start()
    fault = await house.ask(opening(target, **changes), Fault)
    assert (fault.session, fault.code) == ("s1", code)
    assert text in fault.detail
    assert house.counters["faults"] > 0
    assert house.reported(SessionOpened) == []
    await house.answers_truly(target)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (window((7, 9), q_ids=pack_tokens((7, 0, 9, 100_000))), FaultCode.BAD_TOKENS),
        (window((7, 9), q_ids=pack_tokens((7, 0, 9, -1))), FaultCode.BAD_TOKENS),
        (window((7, 9), q_ids=pack_tokens((8, 0, 9, 1))), FaultCode.BAD_TOKENS),
        (window((-7,), q_ids=pack_tokens((8, 0))), FaultCode.BAD_TOKENS),
        (window((7, 9), start=3), FaultCode.OUT_OF_ORDER),
        (window((7, 9), epoch=5), FaultCode.OUT_OF_ORDER),
        (window((7,) * 510), FaultCode.CONTEXT_OVERFLOW),
    ],
)
async def test_windows_that_cannot_be_judged_are_refused(
    start: Start, target: TargetModel, message: DraftWindow, code: FaultCode
) -> None:
    house = start()
    await house.ask(opening(target), SessionReady)
    assert (await house.ask(message, Fault)).code is code
    await house.answers_truly(target)


# --- garbage ----------------------------------------------------------------------------------


async def test_garbage_frames_are_counted_and_harm_nobody(
    start: Start, target: TargetModel
) -> None:
    house = start()
    await house.ask(opening(target), SessionReady)
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
    house.outbox.send(SessionReady("s1", 1, "cloud-9"))
    await house.until(lambda: house.counters["unexpected_messages"] == 2)
    await house.answers_truly(target)


async def test_valid_messages_in_any_order_harm_nobody(start: Start, target: TargetModel) -> None:
    """A thousand of them, about three sessions, with numbers that fit now and then."""
    house = start(max_sessions=3, evict_idle_s=0.0)
    draw = np.random.default_rng(3)

    def some(most: int) -> int:
        return int(draw.integers(0, most))

    def any_message() -> Message:
        session, incarnation = f"s{some(3)}", some(3)
        committed = tuple(int(t) for t in draw.integers(0, 290, some(4)))
        match some(4):
            case 0:
                return CloseSession(session, incarnation, "")
            case 1:
                return opening(
                    target, session=session, incarnation=incarnation, epoch=some(2),
                    next_seq=some(2), committed=pack_tokens(committed),
                    temperature=(0.0, 1.0, 1e-3, 100.0)[some(4)], top_k=some(3),
                    top_p=(1.0, 0.5, 1e-9)[some(3)],
                )  # fmt: skip
            case _:
                tokens = tuple(int(t) for t in draw.integers(0, 290, 1 + some(4)))
                return window(
                    tokens, session=session, incarnation=incarnation, epoch=some(2),
                    seq=some(3), start=len(PROMPT) + some(3),
                )  # fmt: skip

    for _ in range(20):
        for _ in range(50):
            house.outbox.send(any_message())
        await asyncio.sleep(0.01)
    await house.answers_truly(target)
    assert house.counters["failed_jobs"] == 0


async def test_a_model_that_fails_ends_its_session_only(
    start: Start, target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = start()
    await house.ask(opening(target), SessionReady)
    with monkeypatch.context() as broken:

        def failing(*_: Any) -> Any:
            raise RuntimeError("out of memory")

        broken.setattr(target, "run", failing)
        fault = await house.ask(window((7, 9)), Fault)
    assert fault.code is FaultCode.MODEL_FAILED
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
    await house.ask(opening(target), SessionReady)
    handle = CloudSession.handle

    def failing(session: CloudSession, event: Any) -> None:
        if session.state.session == "s1":
            raise LookupError("a bug")
        handle(session, event)

    monkeypatch.setattr(CloudSession, "handle", failing)
    fault = await house.ask(window((7, 9)), Fault)
    assert (fault.code, fault.detail) == (FaultCode.MODEL_FAILED, "the target failed: a bug")
    await house.answers_truly(target)


async def test_an_impossible_event_is_counted_and_survived(
    start: Start, target: TargetModel, caplog: pytest.LogCaptureFixture
) -> None:
    house = start()
    await house.ask(opening(target), SessionReady)
    (session,) = house.worker._sessions.values()
    house.worker._completed([(session, Prefilled(99, 0.0))])
    assert house.counters["impossible_events"] == 1
    assert "Prefilled of job 99" in caplog.text
    assert "OpenSession" in caplog.text  # the story
    await house.answers_truly(target)


async def test_an_older_life_is_told_so_and_does_not_keep_the_session_alive(
    start: Start, target: TargetModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "EXPIRY_CHECK_S", 0.01)
    house = start(session_ttl_s=0.3)
    await house.ask(opening(target, incarnation=9), SessionReady)
    fault = await house.ask(opening(target, incarnation=8, edge="edge-2"), Fault, edge="edge-2")
    assert fault.code is FaultCode.STALE_INCARNATION
    assert "incarnation 8 is older than 9" in fault.detail
    lifecycle = Lifecycle(house.worker._settings, store, house.record)
    watching = asyncio.create_task(house.worker.watch(lifecycle))

    def asked_in_vain() -> bool:
        house.outbox.send(opening(target, incarnation=8, edge="edge-2"))
        house.outbox.send(window((7, 9), incarnation=8))
        return bool(house.reported(SessionClosed))

    await house.until(asked_in_vain)
    assert house.reported(SessionClosed)[0].reason == "expired"
    watching.cancel()


async def test_a_report_that_waits_for_its_turn_is_not_sent_after_the_end(
    start: Start, target: TargetModel
) -> None:
    """It would open the session anew at the controller."""
    house = start()
    await house.ask(opening(target), SessionReady)
    (session,) = house.worker._sessions.values()
    await house.until(lambda: not session.busy)
    alone = list(generate_alone(target, list(PROMPT), SamplingParams(), 2, NEVER))
    report, sent = session._report_window, house.controller.reports

    def at_the_end(effect: Any) -> None:
        house.worker._drop(session, "length")
        report(effect)

    session._report_window = at_the_end  # type: ignore[method-assign]
    await house.ask(window(alone), Feedback)
    await house.until(lambda: house.reported(SessionClosed))
    assert isinstance(sent[-1], SessionClosed)
    assert house.reported(WindowReport) == []


async def test_places_are_given_in_the_order_of_asking(start: Start, target: TargetModel) -> None:
    house = start(max_sessions=1, evict_idle_s=1000.0)
    await house.ask(opening(target), SessionReady)
    for name in ("s2", "s3"):
        await house.ask(opening(target, session=name), Fault, session=name)
    house.outbox.send(CloseSession("s1", 1, "length"))
    fault = await house.ask(opening(target, session="s3"), Fault, session="s3")
    assert "0 sessions are open, 2 wait" in fault.detail
    await house.ask(opening(target, session="s2"), SessionReady, session="s2")
    house.outbox.send(CloseSession("s3", 1, "cancelled"))
    house.outbox.send(CloseSession("s2", 1, "length"))
    await house.ask(opening(target, session="s4"), SessionReady, session="s4")


# --- number and age of sessions ---------------------------------------------------------------


async def test_a_full_worker_sends_edges_elsewhere(start: Start, target: TargetModel) -> None:
    house = start(max_sessions=1, evict_idle_s=1000.0)
    await house.ask(opening(target), SessionReady)
    fault = await house.ask(opening(target, session="s2"), Fault)
    assert (fault.session, fault.code) == ("s2", FaultCode.OVERLOADED)
    await house.ask(opening(target), SessionReady)  # the one it has goes on


async def test_a_full_worker_frees_the_session_idle_for_longest(
    start: Start, target: TargetModel
) -> None:
    house = start(max_sessions=2, evict_idle_s=0.0)
    for session in ("s1", "s2"):
        await house.ask(opening(target, session=session), SessionReady, session=session)
    alone = list(generate_alone(target, list(PROMPT), SamplingParams(), 2, NEVER))
    await house.ask(window(alone), Feedback)  # s1 is used, s2 is not
    await house.ask(opening(target, session="s3"), SessionReady, session="s3")
    assert house.counters["evictions"] == 1
    assert [(m.session, m.reason) for m in house.reported(SessionClosed)] == [("s2", "evicted")]
    answer = await house.ask(window(alone, session="s2"), Feedback, session="s2")
    assert answer.outcome is Outcome.UNKNOWN_SESSION


async def test_a_closed_session_is_freed_but_not_by_an_older_life_of_its_own(
    start: Start, target: TargetModel
) -> None:
    house = start(max_sessions=1, evict_idle_s=1000.0)
    await house.ask(opening(target, incarnation=5), SessionReady)
    house.outbox.send(CloseSession("s1", 4, "late"))
    house.outbox.send(CloseSession("unknown", 4, "late"))
    fault = await house.ask(opening(target, session="s2"), Fault)
    assert fault.code is FaultCode.OVERLOADED
    house.outbox.send(CloseSession("s1", 5, "length"))
    await house.ask(opening(target, session="s2"), SessionReady, session="s2")
    assert [(m.session, m.reason) for m in house.reported(SessionClosed)] == [("s1", "length")]


async def test_sessions_nobody_uses_expire(
    start: Start, target: TargetModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "EXPIRY_CHECK_S", 0.01)
    house = start(session_ttl_s=0.2)
    await house.ask(opening(target), SessionReady)
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
    await house.ask(opening(target), SessionReady)
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


async def test_the_registry_record_says_what_it_runs(start: Start, target: TargetModel) -> None:
    house = start(max_sessions=7)
    record = house.record
    assert (record.bitwise, record.probe_digest) == (target.probe.bitwise, target.probe.digest)
    assert (record.worker_id, record.role, record.dtype, record.device) == (
        "cloud-1", "cloud", "float32", "cpu",
    )  # fmt: skip
    assert (record.tokenizer_digest, record.vocab_size, record.context_length) == (
        target.tokenizer_digest, target.vocab_size, CONTEXT_LENGTH,
    )  # fmt: skip
    assert record.eos_tokens == tuple(sorted(target.eos_tokens))
    assert record.capacity == 7
    assert set(record.endpoints) == {"windows", "feedback"}


def test_messages_are_what_the_codec_knows() -> None:
    assert isinstance(window((1,)), AnyMessage)
