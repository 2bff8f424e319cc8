"""The cloud worker's shell: sockets, sessions, their number and age.

Every message is validated where it arrives; what cannot be used is answered with a `Fault` and
counted, and the worker lives on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from bus.protocol.codec import AnyMessage
from bus.protocol.errors import ImpossibleEventError
from bus.protocol.messages import (
    Ack,
    CloseSession,
    DraftWindow,
    Fault,
    FaultCode,
    Message,
    OpenSession,
    SessionClosed,
    WindowReport,
)
from bus.runtime.monitor import Monitor
from bus.runtime.worker import ControllerLink, Lifecycle, connect_store, new_record
from bus.store import Role, Stories, StoryWriter, WorkerRecord
from bus.transport.sockets import EVERYBODY, Sockets, advertised
from cloud_worker.capable import incapable
from cloud_worker.loading import load_model
from cloud_worker.scheduler import Scheduler
from cloud_worker.session import CloudSession
from cloud_worker.settings import CloudSettings
from cloud_worker.waiting import WaitingRoom
from cloud_worker.watch import CloudTally, SessionWatch
from decoding import cloud, methods
from decoding.cloud_events import AckArrived, WindowArrived
from decoding.story import Story
from engines.energy import find_gauge
from engines.thread import ModelThread, now_ms
from engines.torch.target import TargetModel

log = logging.getLogger(__name__)

EXPIRY_CHECK_S = 1.0
MOST_ENDED = 1000
"""Ended sessions whose stories wait to be written."""


async def serve(settings: CloudSettings) -> None:
    """Load the target and serve until told to leave.

    Raises:
        ConfigurationError: the model, an address or a setting is wrong.
    """
    monitor = settings.monitor(settings.role)
    sockets = Sockets(settings)
    thread = ModelThread(settings.threads)
    try:
        model = await thread.call(load_model, settings)
        store = await connect_store(settings)
        controller = ControllerLink(store, sockets)
        worker = CloudWorker(settings, model, thread, sockets, controller, monitor)
        record = worker.describe(new_record(settings, settings.role, monitor.url))
        lifecycle = Lifecycle(settings, store, record)
        log.info(
            "serving %s (%s, %s); windows at %s",
            model.name, model.dtype, model.probe, worker.endpoint,
        )  # fmt: skip
        monitor.follow(store, lambda _: "" if thread.alive else "the model thread has ended")
        await lifecycle.run(
            worker.receive(), worker.watch(lifecycle), worker.tell_forever(store.stories),
            *([controller.follow_forever()] if settings.role is Role.CLOUD else []),
            drain=lambda: worker.drain(settings.drain_s),
        )  # fmt: skip
        await store.close()
    finally:
        monitor.close()
        sockets.close()
        thread.close()


class CloudWorker:
    """Sessions by id, and what arrives for them."""

    def __init__(
        self,
        settings: CloudSettings,
        model: TargetModel,
        thread: ModelThread,
        sockets: Sockets,
        controller: ControllerLink,
        monitor: Monitor,
    ) -> None:
        self._settings = settings
        self._model = model
        self._thread = thread
        self._gauge = find_gauge(model.device, settings.busy_watts)
        self._controller = controller
        self._name = settings.id_for(settings.role)
        self._counters = sockets.counters
        self._limits = cloud.Limits(
            vocab_size=model.vocab_size,
            context_length=model.context_length,
            threshold_min=settings.threshold_min,
            threshold_max=settings.threshold_max,
            eos=frozenset(model.eos_tokens),
            tree_tokens=settings.tree_tokens,
        )
        self._inbox = sockets.inbox(settings.endpoint(settings.windows_port))
        self._feedback = sockets.publisher(settings.endpoint(settings.feedback_port))
        self._sessions: dict[str, CloudSession] = {}
        self._handles: dict[int, CloudSession] = {}  # those of older incarnations too
        self._waiting = WaitingRoom()
        self._ended: deque[tuple[str, Story]] = deque(maxlen=MOST_ENDED)
        self._loop = asyncio.get_running_loop()
        self._tracing = monitor.tracing
        self._tally = CloudTally(monitor.metrics)
        self._tally.register(
            monitor.metrics, self._sessions, self._waiting, sockets, model.prefixes, self._gauge
        )
        self._scheduler: Scheduler[Any] = Scheduler(
            model, thread, self._gauge, partial(self._soon, self._failed), self._tally.passed
        )
        self._leaving = False

    @property
    def endpoint(self) -> str:
        """Where windows arrive."""
        return self._inbox.endpoint

    def describe(self, record: WorkerRecord) -> WorkerRecord:
        """`record` with this worker's model and endpoints."""
        settings = self._settings
        host = settings.public_host
        return msgspec.structs.replace(
            record,
            endpoints={
                "windows": advertised(self._inbox.endpoint, host, settings.advertise_windows_port),
                "feedback": advertised(
                    self._feedback.endpoint, host, settings.advertise_feedback_port
                ),
            },
            model=self._model.name,
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=str(self._model.device),
            bitwise=self._model.probe.bitwise,
            probe_digest=self._model.probe.digest,
            tokenizer_digest=self._model.tokenizer_digest,
            context_length=self._model.context_length,
            vocab_size=self._model.vocab_size,
            eos_tokens=tuple(sorted(self._model.eos_tokens)),
            speculators=self._model.speculators,
            capacity=self._settings.max_sessions,
        )

    async def receive(self) -> None:
        """Take messages for ever."""
        await self._inbox.deliver(self._dispatch, self._unhandled)

    def _dispatch(self, message: AnyMessage, _size: int) -> None:
        match message:
            case OpenSession():
                self._open(message)
            case DraftWindow() | Ack():
                self._addressed(message)
            case CloseSession():
                session = self._sessions.get(message.session)
                if session is None:
                    self._waiting.leave(message.session)
                elif message.incarnation < session.incarnation:
                    self._stale(session, message)
                else:
                    self._drop(session, message.reason)
            case _:
                self._counters["unexpected_messages"] += 1
                log.warning("a %s does not belong here; ignored", type(message).__name__)

    def _addressed(self, message: DraftWindow | Ack) -> None:
        """A message that names its session by a handle. One that is not known is of a session that
        this worker has lost; its edge opens it again."""
        session = self._handles.get(message.handle)
        if session is None:
            self._send(EVERYBODY, cloud.unknown_session(message))
        elif session.handle != message.handle:
            self._stale(session, message)
        elif isinstance(message, Ack):
            session.post(AckArrived(message, now_ms()))
        else:
            session.post(WindowArrived(message, now_ms()))

    def _stale(self, session: CloudSession, message: DraftWindow | Ack | CloseSession) -> None:
        """A message of an older life of its session is refused.

        It does not name its sender, so nobody is sent a fault; the first one of each incarnation
        here is logged.
        """
        self._counters["stale_messages"] += 1
        if session.stale_logged < session.incarnation:
            session.stale_logged = session.incarnation
            log.warning(
                "session %s: a %s of an older incarnation is ignored, %d runs here; others are "
                "counted",
                session.state.session, type(message).__name__, session.incarnation,
            )  # fmt: skip

    def _impossible(self, session: CloudSession, error: ImpossibleEventError) -> None:
        """It is survived as if it had not been."""
        self._counters["impossible_events"] += 1
        log.error(
            "session %s: %s; ignored. Before:\n%s",
            session.state.session, error, "\n".join(session.story.lines()),
        )  # fmt: skip

    def _unhandled(self, message: AnyMessage, error: Exception) -> None:
        """A message raised: its session ends here, and its edge may try elsewhere."""
        if isinstance(message, DraftWindow | Ack):
            session = self._handles.get(message.handle)
        else:
            session = self._sessions.get(getattr(message, "session", ""))
        if session is not None:
            self._failed(session, error)

    # --- opening ----------------------------------------------------------------------------

    def _open(self, message: OpenSession) -> None:
        known = self._sessions.get(message.session)
        fault = cloud.check_open(message, self._model.tokenizer_digest, self._limits)
        method = methods.find(message.method)
        if fault is None and method is None:
            detail = methods.why_unknown(message.method)[:500]
            fault = Fault(message.session, FaultCode.UNKNOWN_METHOD, detail)
        if fault is None and method is not None:
            fault = incapable(self._model, message, method)
        if fault is None and known is not None:
            fault = cloud.check_reopen(known.incarnation, message)
        if fault is None and known is None:
            fault = self._no_room(message.session)
        if fault is not None or method is None:
            self._counters["faults"] += 1
            if fault is not None:
                self._send(message.edge, fault)
        elif known is not None:
            higher = message.incarnation > known.incarnation
            known.open_again(message, self._new_handle(known) if higher else known.handle)
        else:
            self._begin(message, method)

    def _begin(self, message: OpenSession, method: methods.Method) -> None:
        """A new session; it is kept only once its engine has opened it."""
        session = CloudSession(
            self._model, self._scheduler, self._thread, self._gauge, self._send,
            self._report, self._failed,
        )  # fmt: skip
        handle = self._new_handle(session)
        try:
            session.begin(message, method, self._name, self._limits, handle)
        except Exception as error:
            log.exception("session %s could not be opened", message.session)
            del self._handles[handle]
            if session.cache is not None:
                session.close()
            self._send_failure(message.edge, message.session, error)
            return
        session.watch = SessionWatch(self._tracing, message)
        self._sessions[message.session] = session

    def _new_handle(self, session: CloudSession) -> int:
        """One that no session has, nor is likely to have had in another life of this worker."""
        while (handle := secrets.randbits(31)) in self._handles:
            pass
        self._handles[handle] = session
        return handle

    def _no_room(self, session: str) -> Fault | None:
        """Why one more session does not fit, or None. The longest idle one is dropped if need be,
        and whoever has waited longest comes first."""
        if self._leaving:
            return Fault(session, FaultCode.OVERLOADED, "leaving")
        num_free = self._settings.max_sessions - len(self._sessions)
        oldest = None if num_free > 0 else self._evictable()
        if not self._waiting.admit(session, max(num_free, oldest is not None), now_ms()):
            detail = f"{len(self._sessions)} sessions are open, {len(self._waiting)} wait"
            return Fault(session, FaultCode.OVERLOADED, detail)
        if oldest is not None:
            self._counters["evictions"] += 1
            self._drop(oldest, "evicted")
        return None

    def _evictable(self) -> CloudSession | None:
        """The session idle for longest, where that is long enough to drop it."""
        oldest = min(self._sessions.values(), key=lambda session: session.last_used_ms)
        idle_s = (now_ms() - oldest.last_used_ms) / 1e3
        return None if oldest.busy or idle_s < self._settings.evict_idle_s else oldest

    # --- ending -----------------------------------------------------------------------------

    def _drop(self, session: CloudSession, reason: str) -> None:
        state = session.state
        session.close()
        self._sessions.pop(state.session, None)
        for handle in [h for h, s in self._handles.items() if s is session]:
            del self._handles[handle]
        self._ended.append((state.session, session.story))
        session.watch.closed(reason)
        closed = SessionClosed(state.session, self._name, session.incarnation, reason[:200])
        self._controller.report(closed)

    def _report(self, message: Message) -> None:
        if isinstance(message, WindowReport):
            self._tally.reported(message)
            if (session := self._sessions.get(message.session)) is not None:
                session.watch.reported(message)
        self._controller.report(message)

    def _soon(self, call: Callable[..., None], *args: object) -> None:
        """From the model thread to the event loop, if that still lives."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    def _failed(self, session: CloudSession, error: Exception) -> None:
        """A model job or an event raised: the session ends here, its edge may try elsewhere."""
        if session.closed:
            return
        if isinstance(error, ImpossibleEventError):
            self._impossible(session, error)
            return
        with session.watch.context():
            log.error("session %s: %s", session.state.session, error, exc_info=error)
        self._send_failure(session.edge, session.state.session, error)
        self._drop(session, "failed")

    def _send_failure(self, edge: str, session: str, error: Exception) -> None:
        self._counters["failed_jobs"] += 1
        detail = f"the target failed: {error}"[:500]
        self._send(edge, Fault(session, FaultCode.MODEL_FAILED, detail))

    async def watch(self, lifecycle: Lifecycle) -> None:
        """Free sessions nobody has used for long; keep the registry record current."""
        while True:
            limit_ms = now_ms() - self._settings.session_ttl_s * 1e3
            for session in list(self._sessions.values()):
                if session.last_used_ms < limit_ms and not session.busy:
                    self._counters["expired_sessions"] += 1
                    self._drop(session, "expired")
            counters = dict(self._counters) | self._model.prefixes.counters()
            lifecycle.update(load=len(self._sessions), counters=counters)
            await asyncio.sleep(EXPIRY_CHECK_S)

    async def tell_forever(self, stories: Stories) -> None:
        """Keep the stories of sessions in Redis current."""
        writer = StoryWriter(stories, self._name)

        def told() -> list[tuple[str, Story]]:
            while self._ended:
                writer.ended(*self._ended.popleft())
            return [(name, session.story) for name, session in self._sessions.items()]

        await writer.run_forever(told)

    async def drain(self, limit_s: float) -> None:
        """Send the edges elsewhere and let the running pass end."""
        self._leaving = True
        for session in list(self._sessions.values()):
            fault = Fault(session.state.session, FaultCode.OVERLOADED, "this worker is leaving")
            self._send(session.edge, fault)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._thread.call(lambda: None)
        for session in list(self._sessions.values()):
            self._drop(session, "worker left")

    def _send(self, edge: str, *messages: Message) -> None:
        for message in messages:
            if isinstance(message, Fault):
                self._tally.faults[message.code] += 1
                log.info("fault to %s: %s: %s", edge, message.code, message.detail)
        self._feedback.publish(edge, *messages)
