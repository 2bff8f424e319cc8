"""What every worker process shares: settings, life cycle, heartbeat, the way to the controller.

A worker runs until SIGTERM or SIGINT, then drains: it stops taking work, hands back or finishes
what it has, removes its registry record and leaves. A second signal ends it at once. Where
`parent_pid` is set (by `e2sci up`) the worker also leaves when that process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import msgspec
import uvloop
from pydantic import AliasChoices, Field, field_validator

from bus.protocol.errors import ConfigurationError, E2SCIError, StoreUnavailableError
from bus.protocol.messages import Message
from bus.runtime.logs import configure_logging
from bus.runtime.monitor import Monitor
from bus.runtime.tracing import find_tracing
from bus.settings import BusSettings
from bus.store import HEARTBEAT_S, Role, Store, WorkerRecord
from bus.transport.sockets import Listener, Outbox, Sockets

log = logging.getLogger(__name__)

PARENT_CHECK_S = 1.0
INSIST_S = 0.2

AnySettings = TypeVar("AnySettings", bound="WorkerSettings")


class WorkerSettings(BusSettings):
    """Settings of every worker process; the role's own follow in subclasses."""

    worker_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{0,64}$")] = Field(
        "", description="Unique name in the registry; role and host name where empty."
    )
    bind_host: str = Field("127.0.0.1", description="Address that sockets listen on.")
    advertise_host: str = Field(
        "", description="Address others reach this worker at; where empty, bind_host."
    )
    parent_pid: int = Field(0, description="Leave when this process is gone; 0: never.")
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None,
        description="Port of /metrics and /health over HTTP; 0: any, which the registry shows; "
        "where not set, nothing listens.",
    )
    metrics_host: str = Field(
        "127.0.0.1", description="Address that metrics_port listens on; plain HTTP, no password."
    )
    otel_endpoint: str = Field(
        "",
        validation_alias=AliasChoices(
            "otel_endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT", "E2SCI_OTEL_ENDPOINT"
        ),
        description="OpenTelemetry collector that spans go to, OTLP over HTTP (extra `otel`), e.g. "
        "http://127.0.0.1:4318; also OTEL_EXPORTER_OTLP_ENDPOINT. Where empty, none are made.",
    )
    boot: Annotated[str, Field(pattern=r"^[0-9a-f]{0,32}$")] = Field(
        "", description="Identifies this start of the process; where empty, random."
    )

    @field_validator("metrics_port", mode="before")
    @classmethod
    def _no_port(cls, value: Any) -> Any:
        return None if value == "" else value  # compose passes unset variables on as ""

    def id_for(self, role: str) -> str:
        """The worker's id: as set, else `<role>-<host name>`, unique among containers."""
        return self.worker_id or f"{role}-{socket.gethostname()}"

    def endpoint(self, port: int) -> str:
        """What to bind: `port` 0 takes a free one."""
        host = f"[{self.bind_host}]" if ":" in self.bind_host else self.bind_host
        return f"tcp://{host}:{port or '*'}"

    @property
    def public_host(self) -> str:
        """The address in the registry."""
        if self.advertise_host:
            return self.advertise_host
        return _reachable(self.bind_host)

    def monitor(self, role: str) -> Monitor:
        """Metrics and health of this process, served where `metrics_port` is set, and its spans,
        recorded where `otel_endpoint` is.

        Raises:
            ConfigurationError: nothing can listen there, or the extra `otel` is missing.
        """
        host = self.metrics_host
        public = self.advertise_host if host in WILDCARDS else ""
        if self.metrics_port is not None:
            public = public or _reachable(host)
        tracing = find_tracing(self.otel_endpoint, f"e2sci-{role}", self.id_for(role))
        return Monitor(host, self.metrics_port, public, tracing)


WILDCARDS = ("0.0.0.0", "::", "*")


def _reachable(host: str) -> str:
    """An address of this machine, where sockets listen on all of them."""
    return socket.gethostbyname(socket.gethostname()) if host in WILDCARDS else host


class Lifecycle:
    """Signals, parent watch and the registry record of one worker.

    `draining` is set once the worker should leave. `record` is published every second; the
    worker replaces it through `update` as its load changes.
    """

    def __init__(self, settings: WorkerSettings, store: Store, record: WorkerRecord) -> None:
        self.draining = asyncio.Event()
        self.record = record
        self._settings = settings
        self._recording = asyncio.Lock()  # one write of the record at a time
        self._store = store

    async def run(
        self, *jobs: Coroutine[Any, Any, None], drain: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Run `jobs` until told to leave, then `drain`, then stop them.

        Raises:
            ExceptionGroup: a job failed; the others were stopped.
        """
        gc.collect()
        gc.freeze()  # imports and model live as long as the worker: nothing to look through there
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        all_jobs = (*jobs, self._beat_forever(), self._watch_parent())
        tasks = [loop.create_task(job) for job in all_jobs]
        for task in tasks:
            task.add_done_callback(self._on_end)
        try:
            await self.draining.wait()
            if not _failures(tasks):
                await self._leave()
                await drain()
        finally:
            await _stop(tasks)
        if failures := _failures(tasks):
            raise ExceptionGroup("this worker's jobs failed", failures)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if _failures([task]):
            self.draining.set()

    def _on_signal(self) -> None:
        if self.draining.is_set():
            os._exit(130)
        log.info("leaving: finishing what runs, a second signal ends it at once")
        self.draining.set()

    def update(self, **changes: object) -> None:
        """Change fields of the record; the next heartbeat publishes them."""
        self.record = msgspec.structs.replace(self.record, **changes)

    async def _beat_forever(self) -> None:
        """Publish the record every second; a Redis that is away is waited for."""
        available = True
        while not self.draining.is_set():
            try:
                async with self._recording:
                    if self.draining.is_set():  # a record that comes late would call sessions here
                        return
                    await self._store.registry.beat(self.record)
                if not available:
                    log.info("Redis is back")
                available = True
            except StoreUnavailableError as error:
                if available:
                    log.warning("%s; carrying on and trying again", error)
                available = False
            await asyncio.sleep(HEARTBEAT_S)

    async def _watch_parent(self) -> None:
        """Leave at once when the process that started this one is gone."""
        while self._settings.parent_pid:
            if os.getppid() != self._settings.parent_pid:
                log.warning("the process that started this one is gone; leaving")
                os._exit(1)
            await asyncio.sleep(PARENT_CHECK_S)

    async def _leave(self) -> None:
        """Remove the record, if Redis lets us."""
        with contextlib.suppress(StoreUnavailableError):
            async with self._recording:
                await self._store.registry.remove(self.record.worker_id, self.record.boot)


def _failures(tasks: list[asyncio.Task[None]]) -> list[Exception]:
    ended = [task for task in tasks if task.done() and not task.cancelled()]
    return [error for task in ended if isinstance(error := task.exception(), Exception)]


async def _stop(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel until all have ended. Once is not always enough: on Python 3.11 a task that waits in
    `asyncio.wait_for`, as libraries do, may lose its cancellation (gh-86296)."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=INSIST_S)


def new_record(settings: WorkerSettings, role: str, metrics_url: str = "") -> WorkerRecord:
    """A registry record with a fresh boot number; the worker adds endpoints and model."""
    return WorkerRecord(
        worker_id=settings.id_for(role), role=Role(role),
        boot=settings.boot or secrets.token_hex(8),
        started_at=time.time(), metrics_url=metrics_url,
    )  # fmt: skip


async def connect_store(settings: WorkerSettings) -> Store:
    """The store, waiting for a Redis that is not up yet and saying so once."""
    store = Store(settings)
    said = False
    while True:
        try:
            await store.ping()
            return store
        except StoreUnavailableError as error:
            if not said:
                log.warning("%s; waiting for it", error)
            said = True
            await asyncio.sleep(HEARTBEAT_S)


def run_worker(
    role: str,
    settings_class: type[AnySettings],
    serve: Callable[[AnySettings], Coroutine[Any, Any, None]],
) -> None:
    """The main function of a worker; our own errors become one line and exit status 1, or 2 for a
    wrong configuration."""
    faulthandler.register(signal.SIGUSR1)  # all threads' stacks, to see where it hangs
    try:
        settings = settings_class.from_cli()
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - there is no log yet
        sys.exit(2)
    configure_logging(settings.log_level, settings.id_for(role), settings.log_format)
    try:
        uvloop.run(serve(settings))
    except* E2SCIError as group:
        leaves = _leaves(group)
        for leaf in leaves:
            log.error("%s", leaf)
        # 2: starting again would not help.
        sys.exit(2 if all(isinstance(leaf, ConfigurationError) for leaf in leaves) else 1)


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


class ControllerLink:
    """Follows the live controller through the registry, over its restarts.

    Reports go to whoever is registered; with nobody there they are dropped, since nobody waits
    for the controller. `on_update` gets every message the controller publishes for `edge`.
    An address in the registry that is no address is logged: one wrong setting over there must not
    end the workers here.
    """

    def __init__(
        self,
        store: Store,
        sockets: Sockets,
        edge: str | None = None,
        on_update: Callable[[Message], None] | None = None,
    ) -> None:
        self._store = store
        self._sockets = sockets
        self._edge = edge
        self._on_update = on_update
        self._reports: Outbox | None = None
        self._listening: asyncio.Task[None] | None = None
        self._listener: Listener | None = None
        self._boot = ""

    def report(self, message: Message) -> None:
        """Send to the controller, or drop."""
        if self._reports is not None:
            self._reports.send(message)

    async def follow_forever(self) -> None:
        """Look for the controller every second and connect to a new one."""
        try:
            while True:
                with contextlib.suppress(StoreUnavailableError):
                    for record in await self._store.registry.workers(role="controller"):
                        if record.boot != self._boot:
                            self._try_connect(record)
                        break
                await asyncio.sleep(HEARTBEAT_S)
        finally:
            self._disconnect()

    def _try_connect(self, record: WorkerRecord) -> None:
        self._disconnect()
        self._boot = record.boot
        log.info("controller %s at %s", record.worker_id, record.endpoints.get("reports"))
        try:
            self._connect(record)
        except ConfigurationError as error:
            log.warning("controller %s: %s; going on without it", record.worker_id, error)

    def _connect(self, record: WorkerRecord) -> None:
        if self._edge is None:
            self._reports = self._sockets.outbox(record.endpoints.get("reports", ""))
            return
        self._listener = self._sockets.listener(record.endpoints.get("updates", ""), self._edge)
        assert self._on_update is not None
        on_update = self._on_update
        deliver = self._listener.deliver(lambda message, _size: on_update(message))
        self._listening = asyncio.create_task(deliver)
        self._listening.add_done_callback(self._silenced)

    def _silenced(self, listening: asyncio.Task[None]) -> None:
        """The listener has ended; where not by our own hand, connect anew."""
        if not listening.cancelled() and listening is self._listening:
            log.error("controller: its listener failed", exc_info=listening.exception())
            self._sockets.counters["failed_listeners"] += 1
            self._boot = ""

    def _disconnect(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
        for link in (self._reports, self._listener):
            if link is not None:
                link.close()
        self._reports = self._listening = self._listener = None
