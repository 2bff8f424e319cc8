"""The registry: which workers live, where they listen, what they run.

A worker writes its record every second; a record that was not renewed for five seconds is dead.
Expiry is judged by Redis' clock, so workers on machines with different clocks agree.
"""

from __future__ import annotations

import logging
from enum import StrEnum

import msgspec

from bus.store.connection import Connection
from bus.store.keys import Keys

__all__ = ["HEARTBEAT_S", "TIME_TO_LIVE_S", "Registry", "Role", "WorkerRecord", "records_of"]

HEARTBEAT_S = 1.0
TIME_TO_LIVE_S = 5.0

_log = logging.getLogger(__name__)


class Role(StrEnum):
    """What a worker does. `MIDDLE`: as `CLOUD`, with a model between draft and target, whose text
    are drafts."""

    EDGE = "edge"
    CLOUD = "cloud"
    MIDDLE = "middle"
    CONTROLLER = "controller"


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says about itself.

    Attributes:
        worker_id: unique among all workers; also its PUB/SUB topic.
        role: what it does.
        boot: random, new at each start: tells a restart from a pause.
        endpoints: advertised addresses by name: cloud and middle `windows`, `feedback`; controller
            `reports`, `updates`.
        model, dtype, device: what it runs, on what.
        bitwise: whether its passes give the same bits however tokens are cut into them.
        probe_digest: hex SHA-256 of logits that it computed at start. Bitwise workers of equal
            digest give the same tokens for the same text. Empty: it runs no model, or is older.
        tokenizer_digest: draft and target must agree on it.
        context_length, vocab_size, eos_tokens: the model's.
        speculators: kinds by which a target can propose trees of tokens, as methods name them.
        load, capacity: sessions now, sessions at most.
        counters: e.g. faults, oversize frames.
        metrics_url: of its `/metrics`; empty where nothing listens.
        started_at: seconds since the epoch, the worker's clock.
        expires_at: seconds since the epoch, Redis' clock; set by `Registry.beat`.
    """

    worker_id: str
    role: Role
    boot: str
    endpoints: dict[str, str] = {}
    model: str = ""
    dtype: str = ""
    device: str = ""
    bitwise: bool = False
    probe_digest: str = ""
    tokenizer_digest: str = ""
    context_length: int = 0
    vocab_size: int = 0
    eos_tokens: tuple[int, ...] = ()
    speculators: tuple[str, ...] = ()
    load: int = 0
    capacity: int = 0
    counters: dict[str, int] = {}
    metrics_url: str = ""
    started_at: float = 0.0
    expires_at: float = 0.0

    @property
    def number_format(self) -> str:
        """For people: `int8, bitwise a1b2c3d4`; empty where no model runs."""
        probe = self.probe_digest[:8]
        if not probe:
            return self.dtype
        return f"{self.dtype}, {'bitwise' if self.bitwise else 'probe'} {probe}"


class Registry:
    """Heartbeats and who is alive. Every method raises StoreUnavailableError without Redis."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._key = keys.workers

    async def beat(self, record: WorkerRecord, ttl_s: float = TIME_TO_LIVE_S) -> None:
        """Store the record; it lives for `ttl_s` from now."""
        seconds, micros = await self._connection.execute("TIME")
        record = msgspec.structs.replace(record, expires_at=seconds + micros / 1e6 + ttl_s)
        await self._connection.execute(
            "HSET", self._key, record.worker_id, msgspec.json.encode(record)
        )

    async def workers(self, role: Role | str | None = None) -> list[WorkerRecord]:
        """The workers that live, of one role or all, by id. Dead records are deleted."""
        stored, (seconds, micros) = await self._connection.execute_many(
            [("HGETALL", self._key), ("TIME",)]
        )
        now = seconds + micros / 1e6
        living: list[WorkerRecord] = []
        dead: list[bytes] = []
        for worker_id, data in stored.items():
            record = _parse(worker_id, data)
            if record is None or record.expires_at <= now:
                dead += [worker_id, data]
            else:
                living.append(record)
        if dead:
            await self._connection.run_script("delete_unchanged", [self._key], dead)
        return sorted(
            (record for record in living if role is None or record.role == role),
            key=lambda record: record.worker_id,
        )

    async def remove(self, worker_id: str, boot: str) -> None:
        """Take a worker off the list, unless the record is of another boot by now."""
        while True:
            data = await self._connection.execute("HGET", self._key, worker_id)
            record = None if data is None else _parse(worker_id.encode(), data)
            if record is None or record.boot != boot:
                return
            if await self._connection.run_script(
                "delete_unchanged", [self._key], [worker_id, data]
            ):
                return


def records_of(stored: dict[bytes, bytes]) -> tuple[list[WorkerRecord], int]:
    """The records in the registry's hash, expired ones too, and how many are of other releases."""
    records = [_parse(worker_id, data) for worker_id, data in stored.items()]
    readable = [record for record in records if record is not None]
    return readable, len(records) - len(readable)


def _parse(worker_id: bytes, data: bytes) -> WorkerRecord | None:
    try:
        return msgspec.json.decode(data, type=WorkerRecord)
    except (msgspec.MsgspecError, RecursionError) as error:
        _log.warning("worker record %r dropped: %s", worker_id, error)
        return None
