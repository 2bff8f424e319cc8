"""A real cloud worker on loopback with a tiny target, and messages to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import pytest

from bench.reference import generate_alone
from bus.protocol.arrays import pack_tokens
from bus.protocol.messages import (
    Ack,
    DraftWindow,
    Feedback,
    Message,
    OpenSession,
    SessionReady,
)
from bus.runtime.monitor import Monitor
from bus.runtime.worker import new_record
from bus.settings import BusSettings
from bus.transport.sockets import Sockets
from cloud_worker.server import CloudWorker
from cloud_worker.session import CloudSession
from cloud_worker.settings import CloudSettings
from decoding.sampling import SamplingParams
from engines.thread import ModelThread
from engines.torch.target import TargetCache, TargetModel
from tests.engines.tiny import save_tiny
from tests.sessions import OPENING, drafted_window

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

    def __init__(
        self, worker: CloudWorker, settings: CloudSettings, sockets: Sockets, monitor: Monitor
    ) -> None:
        self.metrics = monitor.metrics
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
        self,
        message: Message,
        kind: type[Any],
        edge: str = "edge-1",
        wanted: Callable[[Any], Any] = lambda _: True,
        **expected: Any,
    ) -> Any:
        """Send until an answer of this kind comes, as an edge does."""
        heard = self.heard.setdefault(edge, [])
        heard.clear()
        for _ in range(int(PATIENCE_S / 0.2)):
            self.outbox.send(message)
            for _ in range(100):
                await asyncio.sleep(0.002)
                for answer in heard:
                    fits = isinstance(answer, kind) and wanted(answer)
                    if fits and all(getattr(answer, k) == v for k, v in expected.items()):
                        return answer
        raise AssertionError(f"no {kind.__name__} {expected} among {heard}")

    async def opens(self, target: TargetModel, edge: str = "edge-1", **changes: Any) -> int:
        """Open a session; returns its handle."""
        message = opening(target, edge=edge, **changes)
        ready = await self.ask(
            message, SessionReady, edge, session=message.session, incarnation=message.incarnation
        )
        handle: int = ready.handle
        return handle

    async def hears(self, target: TargetModel) -> int:
        """From now on an answer reaches the first edge when it is sent, and not with a repeat: that
        goes through the model thread. Leaves an idle session `s0`; returns its handle."""
        handle = await self.opens(target, session="s0")
        await self.until(lambda: not self.session("s0").busy)
        return handle

    async def judges(self, message: DraftWindow, edge: str = "edge-1") -> Feedback:
        """What is committed because of a window."""
        feedback: Feedback = await self.ask(
            message, Feedback, edge, lambda answer: answer.tokens, handle=message.handle
        )
        return feedback

    async def reads(
        self, handle: int, num_tokens: int, acknowledged: int = 0, edge: str = "edge-1"
    ) -> tuple[int, ...]:
        """Text beyond what is acknowledged, once it has so many tokens."""
        length = len(PROMPT) + acknowledged
        feedback = await self.ask(
            Ack(handle, 1, length, again=True), Feedback, edge,
            lambda answer: len(answer.token_ids) >= num_tokens, handle=handle, start=length,
        )  # fmt: skip
        text: tuple[int, ...] = feedback.token_ids
        return text

    def session(self, name: str = "s1") -> CloudSession:
        return self.worker._sessions[name]

    async def until(self, condition: Callable[[], Any]) -> None:
        async def wait() -> None:
            while not condition():  # noqa: ASYNC110 - counters notify nobody
                await asyncio.sleep(0.002)

        await asyncio.wait_for(wait(), PATIENCE_S)

    def reported(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.controller.reports if isinstance(message, kind)]

    async def answers_truly(self, target: TargetModel, session: str = "still-alive") -> None:
        """The worker lives: a new session is opened and a window of the target's own accepted."""
        handle = await self.opens(target, session=session)
        alone = own_text(target, 4)
        assert (await self.judges(window(handle, alone[:3]))).token_ids == alone


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
        monitor = Monitor()
        worker = CloudWorker(full, target, thread, sockets, controller, monitor)
        houses.append(House(worker, full, sockets, monitor))
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
    plain = msgspec.structs.replace(
        OPENING, prompt=pack_tokens(PROMPT), tokenizer_digest=target.tokenizer_digest
    )
    return msgspec.structs.replace(plain, **changes)


def window(
    handle: int, tokens: Sequence[int], after: tuple[int, ...] = (), **changes: Any
) -> DraftWindow:
    """Drafted after the prompt and the tokens `after`, which it acknowledges."""
    common = {"handle": handle, "acknowledged": len(PROMPT) + len(after)}
    return drafted_window((*PROMPT, *after), tuple(tokens), len(PROMPT), **(common | changes))


def own_text(target: TargetModel, num_tokens: int) -> tuple[int, ...]:
    """What the target writes after the prompt."""
    return tuple(generate_alone(target, list(PROMPT), SamplingParams(), num_tokens, NEVER))
