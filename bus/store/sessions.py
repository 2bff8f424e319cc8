"""Sessions' control state, kept by the controller so that it survives its restart.

The newest (term, version) wins: `term` rises with every controller that takes over, `version`
with every update. This module does not know how threshold and window are chosen.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from bus.settings import BusSettings
from bus.store.connection import Connection
from bus.store.entries import text_fields
from bus.store.keys import Keys

__all__ = ["SessionRecord", "Sessions", "parse_session", "session_from_fields"]

_log = logging.getLogger(__name__)


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The control state of one session, see `decoding.control.ControlState`.

    `updated_at` is in seconds since the epoch. What earlier versions did not store has a default.
    """

    session: str
    client: str
    edge: str
    cloud: str
    method: str
    term: int
    version: int
    threshold: float
    window: int
    credit: float
    credit_delta: float
    updated_at: float
    history: tuple[float, ...] = ()
    held: int = 0
    drop: float = 0.0
    incarnation: int = 0


ENDED_TTL_S = 600
"""How long the end of a session is remembered [ours]."""


class Sessions:
    """Save and load. Every method raises StoreUnavailableError without Redis."""

    def __init__(self, connection: Connection, keys: Keys, settings: BusSettings) -> None:
        self._connection = connection
        self._keys = keys
        self._ttl_s = settings.result_ttl_s

    async def next_term(self) -> int:
        """A term that no controller has had; for one that starts."""
        return int(await self._connection.execute("INCR", self._keys.controller_term))

    async def save(self, record: SessionRecord) -> bool:
        """Store `record` unless something newer is there; returns whether it is the newest."""
        fields: dict[str, Any] = msgspec.to_builtins(record)
        fields["history"] = json.dumps(fields["history"])
        words = [str(word) for pair in fields.items() for word in pair]
        stored = await self._connection.run_script(
            "save_session",
            [self._keys.session(record.session)],
            [self._ttl_s, record.term, record.version, *words],
        )
        return bool(stored)

    async def load(self, session: str) -> SessionRecord | None:
        """The session's record, None where there is none."""
        stored = await self._connection.execute("HGETALL", self._keys.session(session))
        return parse_session(stored)

    async def all(self) -> list[SessionRecord]:
        """All records, by session id."""
        keys = await self._connection.scan(self._keys.session("*"))
        stored = await self._connection.execute_many([("HGETALL", key) for key in set(keys)])
        records = [record for fields in stored if (record := parse_session(fields)) is not None]
        return sorted(records, key=lambda record: record.session)

    async def delete(self, session: str) -> None:
        """Forget a session."""
        await self._connection.execute("DEL", self._keys.session(session))

    async def end(self, record: SessionRecord) -> None:
        """Replace a session's record by a marker: `record` as it was at the end, for a while.

        Should the second command get lost, both are there; `ended` wins by its incarnation.
        """
        marker = msgspec.json.encode(record)
        await self._connection.execute_many(
            [
                ("SET", self._keys.ended(record.session), marker, "EX", ENDED_TTL_S),
                ("DEL", self._keys.session(record.session)),
            ]
        )

    async def ended(self) -> list[SessionRecord]:
        """Sessions that ended in the last `ENDED_TTL_S`, the earliest update first."""
        keys = await self._connection.scan(self._keys.ended("*"))
        stored = await self._connection.execute_many([("GET", key) for key in set(keys)])
        records = []
        for data in stored:
            try:
                if data is not None:  # else expired since the scan
                    records.append(msgspec.json.decode(data, type=SessionRecord))
            except msgspec.DecodeError as error:
                _log.warning("end of a session skipped: %s", error)
        return sorted(records, key=lambda record: record.updated_at)

    # --- clients ----------------------------------------------------------------------------

    async def keep_history(self, client: str, history: tuple[float, ...]) -> None:
        """What the next session of this client begins with (`decoding.credit`)."""
        key = self._keys.credit(client)
        await self._connection.execute("SET", key, json.dumps(history), "EX", int(self._ttl_s))

    async def histories(self) -> dict[str, tuple[float, ...]]:
        """What `keep_history` kept, by client."""
        prefix = self._keys.credit("")
        keys = await self._connection.scan(self._keys.credit("*"))
        stored = await self._connection.execute_many([("GET", key) for key in keys])
        kept: dict[str, tuple[float, ...]] = {}
        for key, data in zip(keys, stored, strict=True):
            client = key.decode("utf-8", "replace").removeprefix(prefix)
            try:
                kept[client] = msgspec.json.decode(data or b"[]", type=tuple[float, ...])
            except msgspec.DecodeError as error:
                _log.warning("credit of client %s skipped: %s", client, error)
        return kept

    # --- who controls -----------------------------------------------------------------------

    async def hold_lease(self, holder: str, ttl_s: float) -> bool:
        """Take or renew the controllers' lease; whether `holder` has it now."""
        reply = await self._connection.run_script(
            "lease", [self._keys.controller_lease], [holder, int(ttl_s * 1e3)]
        )
        return bool(reply)

    async def release_lease(self, holder: str) -> None:
        """Give the lease back, if `holder` has it."""
        await self._connection.run_script("release_lease", [self._keys.controller_lease], [holder])


def session_from_fields(fields: Mapping[str, str]) -> SessionRecord:
    """The record in a hash.

    Raises:
        msgspec.ValidationError: it is not one of this release.
    """
    values: dict[str, Any] = {**fields}
    try:
        values["history"] = json.loads(fields.get("history", "[]"))
    except ValueError as error:
        raise msgspec.ValidationError(f"history: {error}") from None
    return msgspec.convert(values, SessionRecord, strict=False)


def parse_session(stored: dict[bytes, bytes]) -> SessionRecord | None:
    """The record in a hash; None where there is none, or (with a log line) not of this release."""
    if not stored:  # expired, perhaps since the scan
        return None
    try:
        return session_from_fields(text_fields(stored))
    except msgspec.ValidationError as error:
        _log.warning("session record skipped: %s", error)
        return None
