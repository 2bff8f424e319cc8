"""`e2sci status`: who works, how full the queue is, which sessions run."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from bus.protocol.errors import ConfigurationError, RequestError
from bus.protocol.requests import session_id
from bus.settings import BusSettings
from bus.store import TIME_TO_LIVE_S, QueueDepth, SessionRecord, Store, WorkerRecord

_PREFIX_CACHE = "prefix_cache_"

__all__ = ["Status", "read_status", "read_story", "require_worker", "show", "show_story"]


class Status(msgspec.Struct, frozen=True):
    """Everything at one moment; lists by id."""

    workers: list[WorkerRecord]
    queue: QueueDepth
    sessions: list[SessionRecord]

    def to_builtins(self) -> dict[str, Any]:
        """As JSON shows it: records as they are kept, and the age of each heartbeat."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        for worker, record in zip(plain["workers"], self.workers, strict=True):
            worker["heartbeat_age_s"] = round(heartbeat_age_s(record), 3)
        return plain


async def read_status(settings: BusSettings) -> Status:
    """Raises StoreUnavailableError without Redis."""
    store = await Store.connect(settings)
    try:
        return Status(
            workers=await store.registry.workers(),
            queue=await store.queue.depth(),
            sessions=await store.sessions.all(),
        )
    finally:
        await store.close()


async def read_story(settings: BusSettings, name: str) -> dict[str, list[str]]:
    """Worker → its last events of a session, by the session's id or its request's.

    Raises:
        RequestError: nobody knows such a session (any more).
        StoreUnavailableError: Redis does not answer.
    """
    store = await Store.connect(settings)
    try:
        told = await store.stories.load(name) or await store.stories.load(session_id(name))
    finally:
        await store.close()
    if not told:
        raise RequestError(
            f"no worker has reported session or request {name!r}; "
            "`e2sci status` lists those that run"
        )
    return told


def show_story(told: dict[str, list[str]], console: Console) -> None:
    """For people: each worker's lines, the oldest first."""
    for worker, lines in told.items():
        console.print(worker, markup=False, highlight=False)
        for line in lines:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


async def require_worker(settings: BusSettings, worker_id: str) -> None:
    """Return if that worker's heartbeat is live; for health checks of containers.

    Raises:
        ConfigurationError: it is not.
        StoreUnavailableError: Redis does not answer.
    """
    store = await Store.connect(settings)
    try:
        living = [record.worker_id for record in await store.registry.workers()]
    finally:
        await store.close()
    if worker_id not in living:
        raise ConfigurationError(
            f"worker {worker_id!r} has no live heartbeat; alive are: {', '.join(living) or 'none'}"
        )


def heartbeat_age_s(record: WorkerRecord) -> float:
    """Seconds since the last heartbeat, 0 … 5 (then the record is dead). Exact where this
    machine's clock is Redis' clock."""
    age_s = time.time() - (record.expires_at - TIME_TO_LIVE_S)
    return min(max(age_s, 0.0), TIME_TO_LIVE_S)


def show(status: Status, console: Console) -> None:
    """Tables for people."""
    queue = status.queue
    console.print(
        f"queue: {queue.length} requests, {queue.pending} of them with an edge worker, "
        f"the oldest {queue.oldest_age_s:.1f} s old"
        if queue.length
        else "queue: empty"
    )
    if not status.workers:
        console.print("workers: none is running; start them with `e2sci up`")
        return
    console.print(_workers_table(status.workers))
    for line in filter(None, map(_prefix_cache, status.workers)):
        console.print(line, markup=False)
    if status.sessions:
        console.print(_sessions_table(status.sessions))


def _workers_table(workers: list[WorkerRecord]) -> Table:
    table = Table("role", "worker", "model", "load", "heartbeat", "counters", title="workers")
    for record in workers:
        table.add_row(
            record.role,
            record.worker_id,
            _model(record),
            f"{record.load}/{record.capacity}" if record.capacity else "-",
            f"{heartbeat_age_s(record):.1f} s ago",
            ", ".join(
                f"{name} {count}"
                for name, count in record.counters.items()
                if not name.startswith(_PREFIX_CACHE)
            )
            or "-",
        )
    return table


def _model(record: WorkerRecord) -> str:
    """A worker's model, in which numbers and where it runs, and what proposes beside it."""
    if not record.model:
        return "-"
    beside = f" + {', '.join(record.speculators)}" if record.speculators else ""
    return f"{record.model}{beside} ({record.number_format}, {record.device})"


def _prefix_cache(record: WorkerRecord) -> str:
    """What a worker's `engines.torch.prefixes.PrefixCache` counts; empty where it has none."""
    counters = record.counters
    if f"{_PREFIX_CACHE}entries" not in counters:
        return ""
    entries, size_mb, hits, tokens = (
        counters.get(_PREFIX_CACHE + name, 0)
        for name in ("entries", "mb", "hits_total", "tokens_total")
    )
    return (
        f"prefix cache of {record.worker_id}: {entries} kept, {size_mb} MiB; "
        f"{hits} hits, {tokens:,} tokens"
    )


def _sessions_table(sessions: list[SessionRecord]) -> Table:
    table = Table("session", "client", "edge", "cloud", "method", "window", "credit",
                  title="sessions")  # fmt: skip
    for record in sessions:
        table.add_row(
            record.session,
            record.client,
            record.edge,
            record.cloud,
            record.method,
            str(record.window),
            f"{record.credit:.2f}",
        )
    return table
