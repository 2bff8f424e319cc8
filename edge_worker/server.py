"""The edge worker's shell: takes prompts from the queue and runs a session for each.

Leases are renewed, cancellations looked for, and messages from cloud workers and the controller
handed to their sessions. What a session does is `edge_worker.session`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import msgspec

from bus.protocol.codec import AnyMessage
from bus.protocol.errors import E2SCIError, RequestError, StoreUnavailableError
from bus.protocol.messages import (
    ControlUpdate,
    Fault,
    Feedback,
    FinishReason,
    Message,
    SessionReady,
)
from bus.protocol.requests import GenerationRequest, session_id
from bus.runtime.logs import log_context
from bus.runtime.monitor import Monitor
from bus.runtime.worker import ControllerLink, Lifecycle, connect_store, new_record
from bus.store import Claim, Store, StoryWriter, WorkerRecord
from bus.transport.sockets import Sockets
from decoding import edge
from decoding.edge_events import ControlArrived, Ended, FaultArrived, FeedbackArrived, Opened, Tick
from decoding.story import Story
from edge_worker.addresses import Addressable, Addresses
from edge_worker.answer import AnswerOutput
from edge_worker.context import SessionContext
from edge_worker.loading import drafter_for, load_model
from edge_worker.memory import PathMemory
from edge_worker.peers import Peer, Peers
from edge_worker.scores import scorer_of
from edge_worker.sessions import RequestSession, session_of
from edge_worker.settings import EdgeSettings
from edge_worker.specs import EdgeModel, spec_of
from edge_worker.text import AnswerText
from edge_worker.usage import UsageMeter
from edge_worker.watch import EdgeTally, RequestWatch, register_worker, why_not_ready
from edge_worker.writer import ResultWriter
from engines.chat import prepare
from engines.thread import ModelThread, now_ms
from engines.torch.thin import NoDrafter

log = logging.getLogger(__name__)

TICK_S = 0.05
CANCEL_POLL_S = 0.25
TAKE_BLOCK_MS = 1000
RETRY_S = 0.5
LONG_TEXT = 4096
"""Characters or tokens from which on text is worked on beside the event loop [ours]."""
T = TypeVar("T")
REOPENS_PER_TERM = 1 << 12
"""Incarnations one owner may use, and uses no more of: a later owner's are always higher, so a
zombie is refused."""


async def serve(settings: EdgeSettings) -> None:
    """Load the draft and answer prompts until told to leave.

    Raises:
        ConfigurationError: the model, an address or a setting is wrong.
    """
    monitor = settings.monitor("edge")
    sockets = Sockets(settings)
    thread = ModelThread(settings.threads)
    try:
        model = await thread.call(load_model, settings)
        await thread.call(prepare, model.tokenizer)
        store = await connect_store(settings)
        worker = EdgeWorker(settings, model, thread, sockets, store, monitor)
        controller = ControllerLink(store, sockets, worker.name, worker.on_message)
        record = worker.describe(new_record(settings, "edge", monitor.url))
        lifecycle = Lifecycle(settings, store, record)
        log.info("drafting with %s (%s, %s)", model.name, model.dtype, model.probe)
        monitor.follow(store, partial(why_not_ready, thread, model.tokenizer_digest))
        await lifecycle.run(
            worker.take_forever(lifecycle), worker.tick_forever(lifecycle),
            worker.renew_forever(), worker.cancel_forever(), worker.tell_forever(),
            controller.follow_forever(),
            drain=lambda: worker.drain(settings.drain_s),
        )  # fmt: skip
        await store.close()
    finally:
        monitor.close()
        sockets.close()
        thread.close()


class Running:
    """A claimed prompt and its session."""

    def __init__(
        self, claim: Claim, request: GenerationRequest, session: RequestSession, watch: RequestWatch
    ) -> None:
        self.claim = claim
        self.request = request
        self.session = session
        self.watch = watch
        self.lost = False
        self.ended = asyncio.Event()


class EdgeWorker:
    """Running prompts by session id, and everything that arrives for them."""

    def __init__(
        self,
        settings: EdgeSettings,
        model: EdgeModel,
        thread: ModelThread,
        sockets: Sockets,
        store: Store,
        monitor: Monitor,
    ) -> None:
        self.name = settings.id_for("edge")
        self._settings = settings
        self._model = model
        self._store = store
        self._counters = sockets.counters
        self._stories = StoryWriter(store.stories, self.name)
        self._peers = Peers(
            store, sockets, self.name, model.tokenizer_digest, model.vocab_size, self._received,
            self._unhandled,
        )  # fmt: skip
        self._context = SessionContext(
            drafter_for(settings, model),
            thread,
            self._peers,
            settings.peer_wait_s,
            PathMemory(),
            sockets.counters,
            addresses=Addresses(self._stories.ended),
        )
        self._running: dict[str, Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._free = asyncio.Semaphore(settings.slots)
        self._text_thread = ThreadPoolExecutor(1, "text")
        self._tracing = monitor.tracing
        self._tally = EdgeTally(monitor.metrics)
        register_worker(monitor.metrics, self._running, sockets, model.prefixes)

    def describe(self, record: WorkerRecord) -> WorkerRecord:
        """`record` with this worker's model."""
        return msgspec.structs.replace(
            record,
            model=self._model.name,
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=str(self._model.device),
            bitwise=self._model.probe.bitwise,
            probe_digest=self._model.probe.digest,
            tokenizer_digest=self._model.tokenizer_digest,
            context_length=self._model.context_length,
            vocab_size=self._model.vocab_size,
            capacity=self._settings.slots,
        )

    # --- taking prompts ---------------------------------------------------------------------

    async def take_forever(self, lifecycle: Lifecycle) -> None:
        """Take a prompt whenever a slot is free."""
        while not lifecycle.draining.is_set():
            await self._free.acquire()
            claim = None
            try:
                claim = await self._store.queue.take(self.name, TAKE_BLOCK_MS)
            except E2SCIError as error:
                log.warning("no prompt taken: %s", error)
                await asyncio.sleep(RETRY_S)
            if claim is None:
                self._free.release()
                continue
            if lifecycle.draining.is_set():
                await self._hand_back(claim)
                return
            task = asyncio.create_task(self._answer(claim))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, claim: Claim) -> None:
        """Answer one prompt to its end; whatever goes wrong, its author is told."""
        request = claim.request
        traceparent = request.traceparent if request is not None else ""
        with log_context(traceparent, claim.request_id, session_id(claim.request_id)):
            watch = RequestWatch(self._tally, self._tracing, claim)
            try:
                try:
                    await self._run_session(claim, watch)
                except RequestError as error:
                    await self._refuse(claim, watch, str(error))
            except Exception:
                log.exception("request %s", claim.request_id)
                await self._refuse(claim, watch, "internal error in the edge worker; see its log")
            finally:
                watch.disowned()  # where it has not ended
                self._free.release()

    async def _refuse(self, claim: Claim, watch: RequestWatch, why: str) -> None:
        log.info("request %s refused: %s", claim.request_id, why)
        self._counters["refused_requests"] += 1
        watch.refused(why)
        writer = ResultWriter(self._store, claim, lambda: None)
        writer.refuse(why)
        await writer.run()

    async def _run_session(self, claim: Claim, watch: RequestWatch) -> None:
        request = claim.request
        if request is None:
            raise RequestError(claim.problem or "it cannot be read")
        thin = isinstance(self._model, NoDrafter)
        drafter = None if thin else self._context.drafter.capabilities
        spec = await self._aside(request.size, spec_of, request, self._model, self.name, drafter)
        spec = watch.begun(spec)
        answer = AnswerText(self._model.tokenizer, request.stop)
        streamed = claim.streamed_tokens
        await self._aside(len(streamed), answer.push, streamed)
        meter = UsageMeter(request.id, spec, len(claim.streamed_tokens), claim.streamed_probes)
        writer = ResultWriter(self._store, claim, lambda: self._lose(running))
        scorer = scorer_of(spec, self._model.tokenizer)
        output = AnswerOutput(answer, meter, writer, self._settings.timeline, scorer, watch)
        session = session_of(
            self._context, output, meter, self._model, spec, self._control(), claim.term
        )
        running = Running(claim, request, session, watch)
        previous = self._running.get(spec.session)
        if previous is not None:  # our own lease ran out, and we claimed the prompt again
            self._lose(previous)
            await previous.ended.wait()
        base = _first_incarnation(claim)
        last = base + REOPENS_PER_TERM - 1
        session.begin(spec, self._control(), claim.streamed_tokens, base, last)
        self._running[spec.session] = running
        try:
            if answer.stopped and not session.finished:
                session.handle(Ended(FinishReason.STOP))
            await writer.run()
        finally:
            session.close()
            del self._running[spec.session]
            running.ended.set()

    async def _aside(self, size: int, job: Callable[..., T], *args: object) -> T:
        """Work on text of `size` characters or tokens; where that is long, on a thread of its own,
        so that other sessions' messages do not wait for it."""
        if size < LONG_TEXT:
            return job(*args)
        return await asyncio.get_running_loop().run_in_executor(self._text_thread, job, *args)

    def _control(self) -> edge.Control:
        settings = self._settings
        return edge.Control(
            settings.threshold, settings.window, settings.conservative_threshold,
            ttl_ms=1e3 * settings.control_ttl_s,
        )  # fmt: skip

    # --- arriving ---------------------------------------------------------------------------

    def _received(self, peer: Peer, message: AnyMessage, size: int) -> None:
        session = self._context.addresses.of(peer, message)
        if session is None:
            return  # of a session that has ended, or another edge's
        session.received(size)
        self._hand_over(session, message)

    def _unhandled(self, peer: Peer, message: AnyMessage, error: Exception) -> None:
        """A message raised where it arrived: its session ends, saying why."""
        session = self._context.addresses.of(peer, message)
        if session is not None:
            why = f"a {type(message).__name__} could not be handled: {error}"
            session.handle(Ended(FinishReason.ERROR, why))

    def on_message(self, message: Message) -> None:
        """Hand a message of the controller to its session."""
        session = self._context.addresses.named(message)
        if session is not None:
            self._hand_over(session, message)

    def _hand_over(self, session: Addressable, message: Message) -> None:
        match message:
            case SessionReady():
                session.handle(Opened(message, now_ms()))
            case Feedback():
                session.handle(FeedbackArrived(message, now_ms()))
            case ControlUpdate():
                session.handle(ControlArrived(message, now_ms()))
            case Fault():
                name = session.state.spec.session
                with log_context(session.state.spec.traceparent, session=name):
                    log.warning("fault for %s: %s: %s", name, message.code, message.detail)
                self._counters["faults"] += 1
                self._tally.faults[message.code] += 1
                session.handle(FaultArrived(message, now_ms()))
            case _:
                self._counters["unexpected_messages"] += 1

    # --- time -------------------------------------------------------------------------------

    async def tick_forever(self, lifecycle: Lifecycle) -> None:
        """Let every session see the time, and keep the registry record current."""
        while True:
            for _, session in self._context.addresses:
                session.handle(Tick(now_ms()))
            counters = dict(self._counters) | self._model.prefixes.counters()
            lifecycle.update(load=len(self._running), counters=counters)
            await asyncio.sleep(TICK_S)

    async def renew_forever(self) -> None:
        """Renew the leases three times as often as they run out."""
        while True:
            await asyncio.sleep(self._settings.lease_s / 3)
            owned = [r for r in self._running.values() if not r.lost]
            if not owned:
                continue
            with contextlib.suppress(StoreUnavailableError):
                lost = await self._store.queue.renew(self.name, [r.claim for r in owned])
                for running in owned:
                    if running.claim.request_id in lost:
                        self._lose(running)

    async def cancel_forever(self) -> None:
        """End sessions whose users have cancelled."""
        while True:
            await asyncio.sleep(CANCEL_POLL_S)
            ids = {r.request.id: r for r in self._running.values()}
            if not ids:
                continue
            with contextlib.suppress(StoreUnavailableError):
                for request_id in await self._store.queue.cancelled(list(ids)):
                    ids[request_id].session.handle(Ended(FinishReason.CANCELLED))

    async def tell_forever(self) -> None:
        """Keep the stories of sessions in Redis current."""
        await self._stories.run_forever(self._told)

    def _told(self) -> list[tuple[str, Story]]:
        return [(name, session.story) for name, session in self._context.addresses]

    def _lose(self, running: Running) -> None:
        """Another term owns the prompt: stop drafting; the writer has stopped or will.

        Told by the run itself, not by its session: this edge may have claimed the prompt again,
        and its new run is not lost.
        """
        if not running.lost:
            running.lost = True
            running.watch.disowned()
            self._counters["lost_leases"] += 1
            log.warning("request %s belongs to another term now", running.claim.request_id)
            running.session.handle(Ended(FinishReason.CANCELLED))

    # --- leaving ----------------------------------------------------------------------------

    async def drain(self, limit_s: float) -> None:
        """Let running prompts end for a while, then hand the rest to other edges at once."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=limit_s)
        for running in self._running.values():
            running.watch.disowned()
        for task in list(self._tasks):
            task.cancel()
        for running in list(self._running.values()):
            await self._hand_back(running.claim)
        with contextlib.suppress(StoreUnavailableError):
            await self._stories.write(self._told())
        self._peers.close()
        self._text_thread.shutdown(wait=False, cancel_futures=True)

    async def _hand_back(self, claim: Claim) -> None:
        """Give the prompt to the next edge; without Redis its lease runs out by itself."""
        with contextlib.suppress(StoreUnavailableError):
            await self._store.queue.release(claim)


def _first_incarnation(claim: Claim) -> int:
    """The last incarnation before those of this claim's owner.

    Raises:
        RequestError: there are none left.
    """
    base = claim.term * REOPENS_PER_TERM
    if base + REOPENS_PER_TERM > edge.MAX_INCARNATION:
        raise RequestError(f"the request has had {claim.term} owners; submit it anew")
    return base
