"""The controller's shell: reports in, updates out, state in Redis.

It is off the token path: nobody waits for it, and a session whose controller is away goes on.
Publishing never waits for Redis; state is written there asynchronously (`controller.writes`). Every
start takes a higher term, so updates of a controller that was replaced are older than its
successor's.

A session that has ended is remembered for a while, in Redis too, so that a message that comes late
does not open it anew, not even after a restart: only an opening of a higher incarnation does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import msgspec

from bus.protocol.codec import AnyMessage
from bus.protocol.errors import StoreUnavailableError
from bus.protocol.messages import ControlUpdate, SessionClosed, SessionOpened, WindowReport
from bus.runtime.metrics import Metrics
from bus.runtime.worker import Lifecycle, connect_store, new_record
from bus.store import ReportEntry, SessionRecord, Store, WorkerRecord
from bus.transport.sockets import Sockets, advertised
from controller.lease import Lease
from controller.policies import Policies
from controller.settings import ControllerSettings
from controller.tuning import Tuner
from controller.watch import ControllerTally
from controller.writes import Ended, Writes
from decoding.control import ControlState, Policy

log = logging.getLogger(__name__)

REPEAT_S = 1.0
CHECK_PAIR_S = 2.0
FORGET_AFTER_S = 600.0
MOST_CLIENTS = 10_000
"""Clients whose credit is remembered [ours]."""
MOST_CLOSED = 10_000
"""Ended sessions that are remembered [ours]."""
DRAIN_S = 5.0


async def serve(settings: ControllerSettings) -> None:
    """Take up what Redis knows and control sessions until told to leave.

    Raises:
        ConfigurationError: an address or a setting is wrong.
    """
    monitor = settings.monitor("controller")
    sockets = Sockets(settings)
    tally = ControllerTally(monitor.metrics, sockets)
    try:
        store = await connect_store(settings)
        monitor.follow(store, lambda _: "")
        record = new_record(settings, "controller", monitor.url)
        lease = Lease(store, record.boot, settings.takeover_s)
        await lease.acquire()
        policies = Policies(settings)
        controller = await Controller.start(settings, store, sockets, policies, tally)
        controller.register(monitor.metrics)
        record = controller.describe(record)
        lifecycle = Lifecycle(settings, store, record)
        log.info("term %d; reports at %s", controller.term, record.endpoints["reports"])
        await lifecycle.run(
            controller.receive(), controller.save_forever(), controller.repeat_forever(lifecycle),
            check_forever(store, policies), *([tally.watch_queue(store)] if monitor.url else []),
            Tuner(settings, store, policies).follow_forever(),
            lease.keep_forever(), drain=partial(leave, controller, lease),
        )  # fmt: skip
        await store.close()
    finally:
        monitor.close()
        sockets.close()


async def leave(controller: Controller, lease: Lease) -> None:
    """Write what waits, then let the next controller begin."""
    await controller.drain(DRAIN_S)
    await lease.release()


async def check_forever(store: Store, policies: Policies) -> None:
    """Look every few seconds which pair is there."""
    while True:
        with contextlib.suppress(StoreUnavailableError):
            policies.check(await store.registry.workers())
        await asyncio.sleep(CHECK_PAIR_S)


@dataclass(frozen=True, slots=True)
class Controlled:
    """A session under control: who it belongs to and what was decided for it."""

    session: str
    client: str
    edge: str
    cloud: str
    method: str
    control: ControlState
    updated_at: float  # seconds since the epoch
    incarnation: int = 0  # the highest one received

    def record(self, term: int) -> SessionRecord:
        """As it is kept in Redis."""
        return SessionRecord(
            session=self.session, client=self.client, edge=self.edge, cloud=self.cloud,
            method=self.method, term=term, version=self.control.version,
            threshold=self.control.threshold, window=self.control.window,
            credit=self.control.credit, credit_delta=self.control.credit_delta,
            updated_at=self.updated_at, history=self.control.history, held=self.control.held,
            drop=self.control.drop, incarnation=self.incarnation,
        )  # fmt: skip

    @classmethod
    def from_record(cls, record: SessionRecord) -> Controlled:
        """As a controller before this one left it."""
        control = ControlState(
            record.threshold, record.window, record.credit, record.credit_delta, record.version,
            record.history, record.held, record.drop,
        )  # fmt: skip
        return cls(
            record.session, record.client, record.edge, record.cloud, record.method, control,
            record.updated_at, record.incarnation,
        )  # fmt: skip

    def update(self, term: int) -> ControlUpdate:
        """As it is published."""
        return ControlUpdate(
            session=self.session, term=term, version=self.control.version,
            threshold=self.control.threshold, window=self.control.window,
            credit=self.control.credit, credit_delta=self.control.credit_delta,
        )  # fmt: skip


def report_entry(report: WindowReport, session: Controlled) -> ReportEntry:
    """A report for telemetry, with the credit that stood before it."""
    return ReportEntry(
        at_ms=time.time_ns() // 1_000_000, request="", session=report.session,
        client=report.client, edge=report.edge, cloud=session.cloud, method=report.method,
        incarnation=report.incarnation, number=report.number, outcome=report.outcome.value,
        num_drafted=report.num_drafted, num_accepted=report.num_accepted,
        num_own=report.num_own, threshold=report.threshold,
        credit=session.control.credit, credit_delta=session.control.credit_delta,
        expected_accepted=report.expected_accepted, mean_jsd=report.mean_jsd,
        num_scored=report.num_scored, log_likelihood=report.log_likelihood,
        num_greedy=report.num_greedy,
        regret=report.regret, edge_ms=report.edge_ms, cloud_ms=report.cloud_ms,
        rework_ms=report.rework_ms, verify_ms=report.verify_ms, queue_ms=report.queue_ms,
        energy_j=report.energy_j,
    )  # fmt: skip


class Controller:
    """Sessions under control, by id."""

    def __init__(
        self,
        settings: ControllerSettings,
        store: Store,
        sockets: Sockets,
        policies: Callable[[str], Policy],
        term: int,
        sessions: dict[str, Controlled],
        histories: dict[str, tuple[float, ...]],
        ended: dict[str, Controlled],
        tally: ControllerTally,
    ) -> None:
        self.term = tally.term = term
        self._tally = tally
        self._settings = settings
        self._store = store
        self._policies = policies
        self._counters = sockets.counters
        self._reports = sockets.inbox(settings.endpoint(settings.reports_port))
        self._updates = sockets.publisher(settings.endpoint(settings.updates_port))
        self._sessions = sessions
        self._histories = histories
        self._ended = ended  # the latest last
        self._writes = Writes(store, sockets.counters, tally)

    @classmethod
    async def start(
        cls,
        settings: ControllerSettings,
        store: Store,
        sockets: Sockets,
        policies: Callable[[str], Policy],
        tally: ControllerTally,
    ) -> Controller:
        """A controller with a new term and the sessions its predecessor left in Redis.

        Raises:
            StoreUnavailableError: Redis does not answer; whoever started us starts us again.
        """
        term = await store.sessions.next_term()
        records = await store.sessions.all()
        sessions = {record.session: Controlled.from_record(record) for record in records}
        ended = _still_ended(await store.sessions.ended(), sessions)
        if sessions:
            log.info("%d sessions taken up from Redis", len(sessions))
        histories = await store.sessions.histories() if settings.carry_credit else {}
        return cls(settings, store, sockets, policies, term, sessions, histories, ended, tally)

    def register(self, metrics: Metrics) -> None:
        """Sessions under control, as a metric."""
        metrics.gauge("controlled_sessions", "Sessions under control.", lambda: len(self._sessions))

    def describe(self, record: WorkerRecord) -> WorkerRecord:
        """`record` with this controller's endpoints."""
        host = self._settings.public_host
        endpoints = {
            "reports": advertised(self._reports.endpoint, host),
            "updates": advertised(self._updates.endpoint, host),
        }
        return msgspec.structs.replace(record, endpoints=endpoints)

    # --- arriving ---------------------------------------------------------------------------

    async def receive(self) -> None:
        """Take messages for ever."""
        await self._reports.deliver(self._dispatch)

    def _dispatch(self, message: AnyMessage, _size: int) -> None:
        match message:
            case SessionOpened():
                self._opened(message)
            case WindowReport():
                self._judged(message)
            case SessionClosed():
                self._closed(message)
            case _:
                self._counters["unexpected_messages"] += 1
                log.warning("a %s does not belong here; ignored", type(message).__name__)

    def _opened(self, message: SessionOpened) -> None:
        ended = self._ended.get(message.session)
        if ended is not None and message.incarnation <= ended.incarnation:
            self._counters["late_messages"] += 1
            return
        known = self._sessions.get(message.session) or self._ended.pop(message.session, None)
        if known is None:
            history = self._histories.get(message.client, ())
            control = self._policies(message.method).initial(history)
        else:
            control = known.control
        self._keep(
            Controlled(
                message.session, message.client, message.edge, message.cloud, message.method,
                control, time.time(), message.incarnation,
            )
        )  # fmt: skip

    def _judged(self, report: WindowReport) -> None:
        self._tally.reports += 1
        session, incarnation = report.session, report.incarnation
        ended = self._ended.get(session)
        if ended is not None and incarnation <= ended.incarnation:
            self._judged_late(report, ended)
            return
        known = self._sessions.get(session)
        if known is None:  # opened while no controller was there
            known = Controlled(
                session, report.client, report.edge, "", report.method,
                self._policies(report.method).initial(), time.time(), incarnation,
            )  # fmt: skip
            self._keep(known)
        self._trace(report, known)
        control = known.control
        if report.num_drafted:
            control = self._policies(known.method).after(control, report)
        # Also without a change: a session that is reported about is not forgotten.
        now = replace(
            known, control=control, updated_at=time.time(),
            incarnation=max(incarnation, known.incarnation),
        )  # fmt: skip
        self._sessions[session] = now
        if control is not known.control:
            self._keep(now)

    def _judged_late(self, report: WindowReport, ended: Controlled) -> None:
        """The session is over; its client's next one still learns from it."""
        self._counters["late_messages"] += 1
        self._trace(report, ended)
        if not report.num_drafted:
            return
        control = self._policies(ended.method).after(ended.control, report)
        self._ended[ended.session] = replace(ended, control=control)
        self._carry(ended.client, control.history)

    def _trace(self, report: WindowReport, session: Controlled) -> None:
        if self._settings.reports:
            self._writes.report(report_entry(report, session))

    def _closed(self, message: SessionClosed) -> None:
        known = self._sessions.get(message.session)
        if known is None or known.cloud not in ("", message.cloud):
            return
        del self._sessions[message.session]
        ended = replace(
            known, incarnation=max(message.incarnation, known.incarnation), updated_at=time.time()
        )
        self._writes.session(message.session, Ended(ended.record(self.term)))
        self._remember(ended)
        self._carry(known.client, known.control.history)

    def _remember(self, ended: Controlled) -> None:
        self._ended.pop(ended.session, None)
        self._ended[ended.session] = ended
        if len(self._ended) > MOST_CLOSED:
            del self._ended[next(iter(self._ended))]

    def _carry(self, client: str, history: tuple[float, ...]) -> None:
        """Keep what the client's next session begins with; of the clients seen last only."""
        if not (self._settings.carry_credit and history):
            return
        self._histories.pop(client, None)
        self._histories[client] = history
        if len(self._histories) > MOST_CLIENTS:
            del self._histories[next(iter(self._histories))]
        self._writes.history(client, history)

    def _keep(self, session: Controlled) -> None:
        """Publish what was decided, and have it saved."""
        self._sessions[session.session] = session
        self._publish(session)
        self._writes.session(session.session, session.record(self.term))

    def _publish(self, session: Controlled) -> None:
        self._tally.updates += 1
        self._updates.publish(session.edge, session.update(self.term))

    # --- leaving traces ---------------------------------------------------------------------

    async def save_forever(self) -> None:
        """Write every change to Redis."""
        await self._writes.run_forever()

    async def drain(self, limit_s: float) -> None:
        """Write what waits, for `limit_s` at most."""
        await self._writes.drain(limit_s)

    async def repeat_forever(self, lifecycle: Lifecycle) -> None:
        """Publish every session's state each second: PUB drops for late subscribers."""
        while True:
            oldest = time.time() - FORGET_AFTER_S
            for session in list(self._sessions.values()):
                if session.updated_at < oldest:
                    del self._sessions[session.session]
                    self._writes.session(session.session, None)
                    continue
                self._publish(session)
            lifecycle.update(load=len(self._sessions), counters=dict(self._counters))
            await asyncio.sleep(REPEAT_S)


def _still_ended(
    markers: list[SessionRecord], sessions: dict[str, Controlled]
) -> dict[str, Controlled]:
    """Of ended sessions those that were not opened again; they are taken out of `sessions`."""
    ended = {}
    for marker in markers[-MOST_CLOSED:]:
        known = sessions.get(marker.session)
        if known is None or known.incarnation <= marker.incarnation:
            sessions.pop(marker.session, None)
            ended[marker.session] = Controlled.from_record(marker)
    return ended
