"""An edge worker and cloud workers in one process: real sockets, a real Valkey, toy engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch

from bus.protocol.messages import CloseSession, FinishReason, Message, OpenSession
from bus.protocol.requests import GenerationRequest
from bus.runtime.monitor import Monitor
from bus.runtime.tracing import Tracing
from bus.runtime.worker import ControllerLink, Lifecycle, new_record
from bus.settings import BusSettings
from bus.store import EndEntry, SessionEntry, Store, TelemetryEntry, TokensEntry
from bus.transport.sockets import Sockets
from cloud_worker.server import CloudWorker
from cloud_worker.settings import CloudSettings, MiddleSettings
from decoding.engine import DraftedWindow, DrafterCapabilities, Segment, TargetRow
from decoding.sampling import SamplingParams
from edge_worker.server import EdgeWorker
from edge_worker.settings import EdgeSettings
from engines.kinds import DrafterKind
from engines.thread import ModelThread
from tests.chain import Middle
from tests.toy import ToyCache, ToyDraft, ToyPair, ToyTarget, target_alone

PATIENCE_S = 60.0
PAIR = ToyPair(vocab_size=24, agreement=0.9, num_sparse=8)
NEVER: frozenset[int] = frozenset()
MODEL: dict[str, Any] = {
    "name": "toy", "dtype": "float64", "device": torch.device("cpu"), "tokenizer_digest": "toy",
    "vocab_size": PAIR.vocab_size, "context_length": ToyTarget.context_length,
    "eos_tokens": NEVER, "probe": SimpleNamespace(bitwise=True, digest="toy-probe"),
    "prefixes": SimpleNamespace(counters=dict, num_tokens=0, num_queried=0),
}  # fmt: skip


class ToyTokenizer:
    """One letter a token."""

    chat_template = "toy"

    def __init__(self) -> None:
        self.added_tokens_decoder: dict[int, Any] = {}

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % PAIR.vocab_size for letter in text]

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(message["content"] for message in messages)

    def get_vocab(self) -> dict[str, int]:
        return {self.convert_ids_to_tokens(token): token for token in range(PAIR.vocab_size)}

    def tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return self.encode("".join(tokens))

    def build_inputs_with_special_tokens(self, tokens: list[int]) -> list[int]:
        return tokens

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(ord("a") + token)

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(map(self.convert_ids_to_tokens, tokens))


class Drafter:
    """A toy drafter behind the engine seam, with the attributes of an edge's model."""

    capabilities = DrafterCapabilities()
    vocab_size: int
    context_length: int

    def __init__(self, **changes: Any) -> None:
        self.tokenizer: Any = ToyTokenizer()
        self.open_caches = 0
        for name, value in (MODEL | changes).items():
            setattr(self, name, value)

    def open(self, sampling: SamplingParams, prompt: Sequence[int] = ()) -> ToyDraft:
        self.open_caches += 1
        return ToyDraft(PAIR, sampling)

    def length(self, cache: ToyDraft) -> int:
        return len(cache.cache)

    def prefill(self, cache: ToyDraft, tokens: Sequence[int]) -> None:
        cache.cache += tuple(tokens)

    def draft(
        self, cache: ToyDraft, feed: Sequence[int], count: int, eos: frozenset[int],
        stop: Callable[[], bool],
    ) -> DraftedWindow:  # fmt: skip
        start, tokens, ids, probs = cache.draft(tuple(feed), count, eos)
        return DraftedWindow(start, len(cache.cache), tokens, ids, probs, 1.0)

    def keep(self, cache: ToyDraft, length: int) -> None:
        cache.crop(length)

    def close(self, cache: ToyDraft) -> None:
        self.open_caches -= 1


class Serving(ToyTarget):
    """A toy target with the attributes of a cloud's model; a pass takes `pass_s`."""

    def __init__(self, pass_s: float = 0.0, pair: ToyPair = PAIR) -> None:
        super().__init__(pair)
        self.pass_s = pass_s
        for name, value in MODEL.items():
            setattr(self, name, value)

    def run(self, batch: Sequence[Segment[ToyCache]]) -> list[list[TargetRow]]:
        time.sleep(self.pass_s)
        return super().run(batch)


class Cloud:
    """A running cloud worker, and the messages it got and sent."""

    def __init__(
        self, house: House, name: str, pass_s: float, pair: ToyPair = PAIR,
        kind: type[CloudSettings] = CloudSettings, **settings: Any,
    ) -> None:  # fmt: skip
        full = kind.load(worker_id=name, **house.where, **settings)
        self.sockets = Sockets(full)
        self.thread = ModelThread(1)
        self.target = cast(Any, Serving(pass_s, pair))
        nobody = cast(Any, SimpleNamespace(report=lambda _: None))
        self.worker = CloudWorker(full, self.target, self.thread, self.sockets, nobody, Monitor())
        self.lifecycle = Lifecycle(
            full, house.store, self.worker.describe(new_record(full, full.role))
        )
        self.house = house
        self.beating = True
        self.tasks = [
            asyncio.create_task(job)
            for job in (
                self.worker.receive(),
                self.worker.watch(self.lifecycle),
                self._beat(),
                self.worker.tell_forever(house.store.stories),
            )
        ]

    async def _beat(self) -> None:
        while True:
            if self.beating:
                await self.house.store.registry.beat(self.lifecycle.record)
            await asyncio.sleep(0.02)

    async def lapse(self) -> None:
        """The heartbeat stays away for a while."""
        self.beating = False
        await self.house.store.registry.remove(
            self.lifecycle.record.worker_id, self.lifecycle.record.boot
        )

    async def stop(self) -> None:
        for task in self.tasks:
            assert not task.done(), task
            task.cancel()
        await asyncio.wait(self.tasks)
        await self.worker.drain(5.0)
        await self.thread.call(lambda: None)
        self.sockets.close()
        self.thread.close()


class House:
    """An edge worker, the cloud workers around it, and the clients of its queue."""

    def __init__(self, store: Store, bus: BusSettings) -> None:
        self.store = store
        self.where = {"redis_url": bus.redis_url, "key_prefix": bus.key_prefix}
        self.clouds: list[Cloud] = []
        self.ended: list[str] = []
        self.sent: list[Message] = []
        self.tracing = Tracing()

    def start(self, drafter: Drafter | None = None, **settings: Any) -> None:
        """Start the edge."""
        common = {"worker_id": "edge-1", "drafter": DrafterKind.MODEL, **self.where}
        self.settings = EdgeSettings.load(**(common | settings))
        self.drafter = drafter or Drafter()
        self.sockets, self.thread = Sockets(self.settings), ModelThread(1)
        model: Any = self.drafter
        self.monitor = Monitor(tracing=self.tracing)
        self.edge = EdgeWorker(
            self.settings, model, self.thread, self.sockets, self.store, self.monitor
        )
        record = self.edge.describe(new_record(self.settings, "edge"))
        self.lifecycle = Lifecycle(self.settings, self.store, record)
        self.link = ControllerLink(self.store, self.sockets, self.edge.name, self.edge.on_message)
        self._record_sends()
        jobs: list[Coroutine[Any, Any, None]] = [
            self.edge.take_forever(self.lifecycle), self.edge.tick_forever(self.lifecycle),
            self.edge.renew_forever(), self.edge.cancel_forever(), self.edge.tell_forever(),
            self.link.follow_forever(),
        ]  # fmt: skip
        self.tasks = [asyncio.create_task(job) for job in jobs]

    def _record_sends(self) -> None:
        """Every message an outbox of the edge sends."""
        make = self.sockets.outbox

        def outbox(endpoint: str) -> Any:
            made = make(endpoint)
            send = made.send

            def recorded(message: Message) -> int:
                self.sent.append(message)
                return send(message)

            made.send = recorded  # type: ignore[method-assign]
            return made

        self.sockets.outbox = outbox  # type: ignore[method-assign]

    def cloud(self, name: str = "cloud-1", pass_s: float = 0.0, **settings: Any) -> Cloud:
        """Start a cloud worker."""
        self.clouds.append(Cloud(self, name, pass_s, **settings))
        return self.clouds[-1]

    def middle(
        self, name: str = "middle-1", pass_s: float = 0.0, closeness: float = 0.9, **settings: Any
    ) -> Cloud:
        """Start a middle worker, whose model is the target's to the part `closeness`."""
        pair = Middle(PAIR.vocab_size, PAIR.agreement, PAIR.seed, closeness=closeness)
        self.clouds.append(Cloud(self, name, pass_s, pair, MiddleSettings, **settings))
        return self.clouds[-1]

    def opens(self) -> list[OpenSession]:
        return [message for message in self.sent if isinstance(message, OpenSession)]

    def closes(self) -> list[CloseSession]:
        return [message for message in self.sent if isinstance(message, CloseSession)]

    async def submit(self, name: str, **fields: Any) -> str:
        common: dict[str, Any] = {"prompt": f"prompt {name}", "max_new_tokens": 24, "raw": True}
        return await self.store.queue.submit(
            GenerationRequest(id=name, **(common | {"method": "sd"} | fields))
        )

    async def answer(self, name: str) -> tuple[tuple[int, ...], str, EndEntry]:
        """Tokens, text and end of a request."""
        tokens, text = list[int](), ""
        async with asyncio.timeout(PATIENCE_S):
            async for entry in self.store.results.read(name):
                if isinstance(entry, TokensEntry):
                    assert entry.start == len(tokens)
                    tokens += entry.tokens
                    text += entry.text
                else:
                    self.ended.append(name)
                    return tuple(tokens), text, entry
        raise AssertionError("no end")

    def expected(self, name: str, max_new_tokens: int = 24) -> tuple[int, ...]:
        """What the target alone answers."""
        prompt = tuple(ToyTokenizer().encode(f"prompt {name}"))
        return target_alone(PAIR, prompt, SamplingParams(), max_new_tokens, NEVER)

    async def answers(self, name: str, **fields: Any) -> None:
        """The edge lives: a request gets its answer."""
        await self.submit(name, **fields)
        tokens, text, end = await self.answer(name)
        assert end.end.error == ""
        assert tokens == self.expected(name)
        assert text == ToyTokenizer().decode(tokens)

    async def telemetry(self, num_sessions: int) -> list[TelemetryEntry]:
        """All entries, once so many sessions have their last one: it follows the answer's end."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                entries = [entry for _, entry in await self.store.telemetry.read()]
                if sum(isinstance(entry, SessionEntry) for entry in entries) >= num_sessions:
                    return entries
                await asyncio.sleep(0.02)

    async def fails(self, name: str, text: str, **fields: Any) -> None:
        """The edge ends a request with an error that says `text`."""
        await self.submit(name, **fields)
        _, _, end = await self.answer(name)
        assert end.end.finish_reason is FinishReason.ERROR
        assert text in end.end.error

    async def until(self, condition: Callable[[], Any]) -> None:
        async def wait() -> None:
            while not condition():  # noqa: ASYNC110 - counters notify nobody
                await asyncio.sleep(0.005)

        await asyncio.wait_for(wait(), PATIENCE_S)

    async def stop(self) -> None:
        for task in self.tasks:
            assert not task.done(), task
        self.lifecycle.draining.set()
        await self.edge.drain(0.0)
        while not all(task.done() for task in self.tasks):
            for task in self.tasks:
                task.cancel()
            await asyncio.wait(self.tasks, timeout=0.1)
        for cloud in self.clouds:
            await cloud.stop()
        await self.thread.call(lambda: None)
        self.sockets.close()
        self.thread.close()
