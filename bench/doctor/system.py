"""Redis and what is registered in it, read without changing anything."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from bench.doctor.checks import Check, Figure, failed, ok, skipped, warning
from bus.protocol.errors import ConfigurationError, StoreUnavailableError
from bus.settings import BusSettings
from bus.store import (
    TIME_TO_LIVE_S,
    Overview,
    QueueState,
    Role,
    SessionEntry,
    TelemetryEntry,
    WindowEntry,
    WorkerRecord,
)
from bus.store.connection import CommandRefusedError, Connection
from bus.store.entries import entry_time_s
from bus.store.keys import GROUP, Keys
from bus.store.overview import Overviews
from bus.store.telemetry import Telemetry

LEAST_VERSION = (7, 0)
_PINGS = 10
_SLOW_MS = 5.0
"""Latency of Redis from which on the queue delays first tokens visibly."""
_FULL = 0.8
_SKEW_S, _OLD_HEARTBEAT_S = 1.0, 3.0
_LEAST_ENTRIES = 5

Entries = list[tuple[str, TelemetryEntry]]


class System(msgspec.Struct, frozen=True):
    """What Redis holds and how it answers.

    Attributes:
        latency_ms: median of a PING. skew_s: Redis' clock minus this machine's, measured to within
            half of `latency_ms`.
        info: answer of INFO. overview: queue and workers. telemetry: (id, entry), oldest first.
        has_group: whether edges have ever waited for prompts.
    """

    latency_ms: float
    skew_s: float
    info: dict[str, Any]
    overview: Overview
    telemetry: Entries
    has_group: bool

    @property
    def live(self) -> list[WorkerRecord]:
        """Workers whose heartbeat has not expired, by id."""
        now_s = self.overview.now_s
        live = [record for record in self.overview.workers if record.expires_at > now_s]
        return sorted(live, key=lambda record: record.worker_id)


async def read_system(settings: BusSettings) -> System:
    """Everything that the checks below need.

    Raises:
        StoreUnavailableError: Redis does not answer.
        ConfigurationError: it refuses user or password.
    """
    connection, keys = Connection(settings), Keys(settings.key_prefix)
    try:
        latency_ms, skew_s = await _latency(connection)
        return System(
            latency_ms=latency_ms,
            skew_s=skew_s,
            info=dict(await connection.execute("INFO")),
            overview=await Overviews(connection, keys).read(),
            telemetry=await Telemetry(connection, keys).read(),
            has_group=await _has_group(connection, keys),
        )
    finally:
        await connection.close()


async def _latency(connection: Connection) -> tuple[float, float]:
    """Milliseconds of a PING, the median; and Redis' clock minus ours in seconds."""
    await connection.execute("PING")
    times_ms, skews_s = [], []
    for _ in range(_PINGS):
        began, began_s = time.perf_counter(), time.time()
        seconds, micros = await connection.execute("TIME")
        took_s = time.perf_counter() - began
        times_ms.append(1e3 * took_s)
        skews_s.append(seconds + micros / 1e6 - (began_s + took_s / 2))
    return statistics.median(times_ms), statistics.median(skews_s)


async def _has_group(connection: Connection, keys: Keys) -> bool:
    try:
        groups = await connection.execute("XINFO GROUPS", keys.prompts)
    except CommandRefusedError:  # there is no stream yet
        return False
    return any(group["name"] == GROUP.encode() for group in groups)


def unreachable(error: StoreUnavailableError | ConfigurationError) -> Check:
    """Redis does not answer, or refuses us."""
    return failed("redis", f"{error}.", "Start Redis 7 or newer, or unset E2SCI_REDIS_URL: "
                  "`e2sci up` then starts an embedded Valkey.")  # fmt: skip


# --- Redis ------------------------------------------------------------------------------------


def check_redis(info: Mapping[str, Any], latency_ms: float) -> list[Check]:
    """Version, role, eviction, persistence, memory and latency.

    Args:
        info: answer of INFO, by field.
    """
    checks = [*_kind(info), *_memory(info), *_persistence(info)]
    name = f"{'Valkey' if 'valkey_version' in info else 'Redis'} {_version(info)}"
    figures: dict[str, Figure] = {"latency_ms": round(latency_ms, 3), "version": _version(info)}
    if latency_ms > _SLOW_MS:
        checks.append(warning(
            "redis", f"{name} answers in {latency_ms:.1f} ms (measured): each first token waits "
            "for several answers.", "Run Redis nearer to the edge workers.", **figures,
        ))  # fmt: skip
    else:
        checks.insert(0, ok("redis", f"{name} answers in {latency_ms:.2f} ms (measured).",
                            **figures))  # fmt: skip
    return checks


def _version(info: Mapping[str, Any]) -> str:
    return str(info.get("valkey_version") or info.get("redis_version") or "of unknown version")


def _kind(info: Mapping[str, Any]) -> Iterable[Check]:
    speaks = str(info.get("redis_version", "0"))
    parts = [int(part) if part.isdecimal() else 0 for part in speaks.split(".")[:2]]
    if tuple(parts) < LEAST_VERSION:
        yield failed("redis", f"Redis is version {speaks}; the queue's scripts need 7.0.",
                     "Update Redis, or use Valkey.", version=speaks)  # fmt: skip
    if str(info.get("cluster_enabled", 0)) == "1":
        yield failed("redis", "This Redis is a cluster; the queue's scripts need one server.",
                     "Use a server without cluster mode.")  # fmt: skip
    if info.get("role", "master") != "master":
        yield failed("redis", "This Redis is a replica and takes no writes.",
                     "Point E2SCI_REDIS_URL at its primary server.")  # fmt: skip


def _memory(info: Mapping[str, Any]) -> Iterable[Check]:
    policy = str(info.get("maxmemory_policy", "noeviction"))
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if policy != "noeviction":
        found = failed if most else warning
        yield found("redis-eviction", f"Redis evicts keys when it is full ({policy}): prompts and "
                    "answers can disappear.", "Set maxmemory-policy noeviction.",
                    policy=policy)  # fmt: skip
    if most and used > _FULL * most:
        yield warning("redis-memory", f"Redis uses {used / 1e6:.0f} of {most / 1e6:.0f} MB; at the "
                      "limit it refuses prompts.", "Raise maxmemory, or lower E2SCI_RESULT_TTL_S.",
                      used_bytes=used, limit_bytes=most)  # fmt: skip
    else:
        limit = f" of {most / 1e6:.0f}" if most else ", without a limit"
        yield ok("redis-memory", f"Redis uses {used / 1e6:.0f} MB{limit}.",
                 used_bytes=used, limit_bytes=most or None)  # fmt: skip


def _persistence(info: Mapping[str, Any]) -> Iterable[Check]:
    if str(info.get("aof_enabled", 0)) != "1":
        yield warning("redis-persistence", "Redis keeps no append-only file: a crash loses the "
                      "prompts since its last snapshot, if it makes any.",
                      "Set appendonly yes.")  # fmt: skip
    elif info.get("aof_last_write_status", "ok") != "ok":
        yield failed("redis-persistence", "Redis could not write its append-only file.",
                     "Look at its log; its disk may be full.")  # fmt: skip
    else:
        yield ok("redis-persistence", "Redis writes an append-only file: a restart keeps the "
                 "queue.")  # fmt: skip


# --- queue ------------------------------------------------------------------------------------


def check_queue(queue: QueueState, has_group: bool, has_edge: bool, most: int) -> list[Check]:
    """Consumer group, backlog and dead letters.

    Args:
        most: requests at which new ones are refused.
    """
    total = queue.waiting + queue.running
    figures: dict[str, Figure] = {
        "waiting": queue.waiting,
        "running": queue.running,
        "given_up": queue.given_up,
        "oldest_wait_s": queue.oldest_wait_s,
    }
    sentence = f"{queue.waiting} requests wait and {queue.running} run"
    checks = []
    if total > _FULL * most:
        checks.append(warning("queue", f"{sentence}; at {most} new ones are refused.",
                              "Start more edge and cloud workers, or raise E2SCI_MAX_QUEUE.",
                              **figures))  # fmt: skip
    if queue.waiting and not has_edge:
        checks.append(failed("queue", f"{sentence}, and no edge worker is there to take them.",
                             "Start one: `e2sci up`, or `python -m edge_worker`.",
                             **figures))  # fmt: skip
    elif has_edge and not has_group:
        checks.append(failed("queue", "Edge workers run, but their consumer group is missing.",
                             "Check that they use the same E2SCI_KEY_PREFIX and "
                             "database.", **figures))  # fmt: skip
    if queue.given_up:
        checks.append(warning("queue", f"{queue.given_up} requests were given up after their last "
                              "delivery.", "XRANGE e2sci:dead - + shows why; XTRIM removes "
                              "them.", **figures))  # fmt: skip
    return checks or [ok("queue", f"{sentence}; none was given up.", **figures)]


# --- clocks -----------------------------------------------------------------------------------


def check_clocks(system: System) -> list[Check]:
    """This machine's clock and the edges' against Redis'. Leases and heartbeats use Redis' clock
    alone; the others matter for logs and telemetry."""
    skews = {"this machine": -system.skew_s}
    skews |= {f"edge worker {name}": skew_s for name, skew_s in _edge_skews(system.telemetry)}
    early = [r for r in system.live if r.started_at - system.overview.now_s > _SKEW_S]
    skews |= {
        f"{record.role} worker {record.worker_id}": record.started_at - system.overview.now_s
        for record in early
    }
    checks = [
        warning("clocks", f"The clock of {name} is {abs(skew_s):.1f} s "
                f"{'ahead of' if skew_s > 0 else 'slower than'} that of Redis.",
                "Synchronise the machines' clocks (chrony, systemd-timesyncd).",
                skew_s=round(skew_s, 3))
        for name, skew_s in skews.items() if abs(skew_s) > _SKEW_S
    ]  # fmt: skip
    return checks or [
        ok("clocks", f"This machine's clock and that of Redis differ by "
           f"{1e3 * abs(system.skew_s):.1f} ms (measured).", skew_s=round(system.skew_s, 6))
    ]  # fmt: skip


def _edge_skews(telemetry: Entries) -> Iterable[tuple[str, float]]:
    """An entry has its edge's time in it, and in its id the time at which Redis took it in."""
    found: dict[str, list[float]] = defaultdict(list)
    for entry_id, entry in telemetry[-1000:]:
        if isinstance(entry, WindowEntry | SessionEntry):
            found[entry.edge].append(entry.at_ms / 1e3 - entry_time_s(entry_id))
    for edge, skews_s in found.items():
        if len(skews_s) >= _LEAST_ENTRIES:
            yield edge, statistics.median(skews_s)


# --- workers ----------------------------------------------------------------------------------


def check_workers(system: System) -> list[Check]:
    """Who lives, and whether edges and clouds fit together."""
    overview, live = system.overview, system.live
    checks = [_alive(record, overview.now_s) for record in live]
    expired = [r.worker_id for r in overview.workers if r.expires_at <= overview.now_s]
    if expired:
        checks.append(warning("workers", f"No heartbeat for {TIME_TO_LIVE_S:g} s from "
                              f"{', '.join(expired)}.",
                              "Look at the log of what ran there; restart it."))  # fmt: skip
    if overview.unreadable:
        checks.append(failed("workers", f"{overview.unreadable} records are of another release.",
                             "Run the same release on every machine."))  # fmt: skip
    if not live:
        checks.append(skipped("workers", "No worker is registered.",
                              "Start them with `e2sci up`."))  # fmt: skip
        return checks
    return [*checks, *_fitting(live), *_complete(live)]


def _alive(record: WorkerRecord, now_s: float) -> Check:
    age_s = max(0.0, now_s - (record.expires_at - TIME_TO_LIVE_S))
    model = f" with {record.model} ({record.number_format})" if record.model else ""
    sentence = (
        f"{record.role.capitalize()} worker {record.worker_id}{model}, heartbeat {age_s:.1f} s old"
    )
    figures: dict[str, Figure] = {
        "worker": record.worker_id,
        "role": str(record.role),
        "model": record.model,
        "heartbeat_age_s": round(age_s, 3),
        "load": record.load,
        "capacity": record.capacity,
    }
    if age_s > _OLD_HEARTBEAT_S:
        return warning("workers", f"{sentence}; it beats every second.",
                       "Its machine is overloaded, or Redis is slow to reach from there.",
                       **figures)  # fmt: skip
    if 0 < record.capacity <= record.load and record.role is not Role.EDGE:
        return warning("workers", f"{sentence}; it is full: {record.load} sessions.",
                       "Start another one, or raise E2SCI_MAX_SESSIONS.", **figures)  # fmt: skip
    return ok("workers", f"{sentence}.", **figures)


def _fitting(live: Sequence[WorkerRecord]) -> Iterable[Check]:
    """Every edge needs a cloud of its tokenizer whose tokens it all has (`edge_worker.peers`)."""
    clouds = [record for record in live if record.role is Role.CLOUD]
    for edge in (record for record in live if record.role is Role.EDGE):
        akin = [c for c in clouds if c.tokenizer_digest == edge.tokenizer_digest]
        if clouds and not akin:
            yield failed("tokenizers", f"No cloud worker shares the tokenizer of {edge.worker_id} "
                         f"({edge.model}).", "Start both with the same --pair.")  # fmt: skip
        elif akin and all(c.vocab_size > edge.vocab_size for c in akin):
            yield failed("tokenizers", f"{edge.worker_id} knows {edge.vocab_size} tokens, fewer "
                         "than its cloud workers write.",
                         "Use a draft with a row for every token.")  # fmt: skip
        elif akin:
            yield ok("tokenizers", f"{edge.worker_id} fits {_names(akin)}.")
    probes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cloud in clouds:
        probes[cloud.model, cloud.tokenizer_digest].add(cloud.probe_digest)
    for (model, _), digests in probes.items():
        if len(digests) > 1:
            yield warning("probes", f"The cloud workers of {model} compute different bits: an "
                          "answer that moves between them may change.",
                          "Run the same release, file and --dtype on all.")  # fmt: skip


def _complete(live: Sequence[WorkerRecord]) -> Iterable[Check]:
    roles = {record.role for record in live}
    if Role.EDGE not in roles:
        yield failed("workers", "No edge worker is registered: nothing takes prompts.",
                     "Start one: python -m edge_worker.")  # fmt: skip
    if Role.CLOUD not in roles:
        yield failed("workers", "No cloud worker is registered: prompts wait.",
                     "Start one: python -m cloud_worker.")  # fmt: skip
    if Role.CONTROLLER not in roles:
        yield warning("workers", "No controller is registered: thresholds stay at their "
                      "conservative value.", "Start one: python -m controller.")  # fmt: skip


def _names(records: Sequence[WorkerRecord]) -> str:
    return ", ".join(record.worker_id for record in records)
