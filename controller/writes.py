"""What the controller has to write to Redis: the newest of each thing, in the order of change.

Nobody waits for it. A session that changes ten times while Redis is slow is written once, so what
waits is bounded by the number of sessions and clients; of reports the oldest are dropped. While
Redis is away everything stays here, and what has not been written yet goes out before the
controller leaves.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from dataclasses import dataclass

from bus.protocol.errors import StoreUnavailableError
from bus.store import ReportEntry, SessionRecord, Store
from controller.watch import ControllerTally

log = logging.getLogger(__name__)

RETRY_S = 0.5
MOST_SESSIONS = 10_000
MOST_REPORTS = 10_000
_BATCH = 200


@dataclass(frozen=True)
class Ended:
    """A session is over; `last` is how it was."""

    last: SessionRecord


class Writes:
    """Pending writes. `counters` gets `unsaved_sessions` (failed attempts), `dropped_writes`;
    `tally` the records that were written."""

    def __init__(self, store: Store, counters: Counter[str], tally: ControllerTally) -> None:
        self._store = store
        self._counters = counters
        self._tally = tally
        self._sessions: dict[str, SessionRecord | Ended | None] = {}
        self._histories: dict[str, tuple[float, ...]] = {}
        self._reports: deque[ReportEntry] = deque()
        self._some = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def session(self, name: str, record: SessionRecord | Ended | None) -> None:
        """Save a session's record, mark it as ended, or delete it."""
        self._sessions.pop(name, None)
        self._sessions[name] = record
        self._bounded(self._sessions)

    def history(self, client: str, history: tuple[float, ...]) -> None:
        """Keep what the client's next session begins with."""
        self._histories.pop(client, None)
        self._histories[client] = history
        self._bounded(self._histories)

    def report(self, entry: ReportEntry) -> None:
        """Add a report to telemetry."""
        self._reports.append(entry)
        if len(self._reports) > MOST_REPORTS:
            self._reports.popleft()
            self._counters["dropped_writes"] += 1
        self._woken()

    def _bounded(
        self,
        pending: dict[str, SessionRecord | Ended | None] | dict[str, tuple[float, ...]],
    ) -> None:
        if len(pending) > MOST_SESSIONS:
            del pending[next(iter(pending))]
            self._counters["dropped_writes"] += 1
        self._woken()

    def _woken(self) -> None:
        self._some.set()
        self._idle.clear()

    async def run_forever(self) -> None:
        """Write whatever there is; a Redis that is away is waited for."""
        while True:
            await self._some.wait()
            try:
                await self._write()
            except StoreUnavailableError as error:
                log.warning("not saved yet: %s", error)
                self._counters["unsaved_sessions"] += 1
                await asyncio.sleep(RETRY_S)
            if not (self._sessions or self._histories or self._reports):
                self._some.clear()
                self._idle.set()

    async def drain(self, limit_s: float) -> None:
        """Return once all is written, or after `limit_s`."""
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("leaving with %d sessions unsaved", len(self._sessions))

    async def _write(self) -> None:
        """One session, one history, a batch of reports; each is taken off once it is written."""
        if self._sessions:
            name, record = next(iter(self._sessions.items()))
            if record is None:
                await self._store.sessions.delete(name)
            elif isinstance(record, Ended):
                await self._store.sessions.end(record.last)
            else:
                await self._store.sessions.save(record)
            self._tally.records += 1
            if self._sessions.get(name) is record:  # else it has changed meanwhile
                self._sessions.pop(name, None)
        if self._histories:
            client, history = next(iter(self._histories.items()))
            await self._store.sessions.keep_history(client, history)
            self._tally.records += 1
            if self._histories.get(client) is history:
                self._histories.pop(client, None)
        if self._reports:
            batch = [self._reports.popleft() for _ in range(min(_BATCH, len(self._reports)))]
            try:
                await self._store.telemetry.add(*batch)
            except StoreUnavailableError:
                self._reports.extendleft(reversed(batch))
                raise
            self._tally.records += len(batch)
