"""Sessions' control state, kept by the controller so that it survives its restart.

The newest (term, version) wins: `term` rises with every controller that takes over, `version`
with every update. This module does not know how threshold and window are chosen.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from bus.settings import BusSettings
from bus.store.connection import Connection
from bus.store.entries import text_fields
from bus.store.keys import Keys

__all__ = ["SessionRecord", "Sessions"]

_log = logging.getLogger(__name__)


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The control state of one session; `updated_at` in seconds since the epoch."""

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
        return _parse(stored)

    async def all(self) -> list[SessionRecord]:
        """All records, by session id."""
        keys = await self._connection.scan(self._keys.session("*"))
        stored = await self._connection.execute_many([("HGETALL", key) for key in set(keys)])
        records = [record for fields in stored if (record := _parse(fields)) is not None]
        return sorted(records, key=lambda record: record.session)

    async def delete(self, session: str) -> None:
        """Forget a session."""
        await self._connection.execute("DEL", self._keys.session(session))


def _parse(stored: dict[bytes, bytes]) -> SessionRecord | None:
    if not stored:  # expired, perhaps since the scan
        return None
    try:
        return msgspec.convert(text_fields(stored), SessionRecord, strict=False)
    except msgspec.ValidationError as error:
        _log.warning("session record skipped: %s", error)
        return None
