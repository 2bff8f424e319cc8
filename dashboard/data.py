"""Redis → data frames, incrementally.

One `Feed` serves every viewer of the process. It remembers the last telemetry entry it has read
and asks only for newer ones; what it read is folded into counts (`telemetry.Tail`). Everything
else it asks for is small (`bus.store.overview`).

All times are Redis's own clock (stream ids, TIME), so that edges and dashboards whose clocks are
off still agree. Nothing is written to Redis. Knows neither Redis commands nor Streamlit nor
plotly.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Self

import pandas as pd

from bus.settings import BusSettings
from bus.store import HeldRequest, QueueState, Store
from bus.store.blocking import BlockingStore
from dashboard.frames import Span
from dashboard.roster import Roster
from dashboard.sessions import session_frame
from dashboard.telemetry import KEEP_S, Tail

_PAGE = 2_000
"""Telemetry entries a command: bounds the size of one reply."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the page shows.

    Attributes:
        now_s: Redis's clock when this was read, seconds since the epoch.
        span: the charts' time range.
        since_s: nothing is known of the time before; may lie within `span`.
        traffic: `frames.TRAFFIC_COLUMNS`, from the range's beginning to `now_s`.
        sessions, finished, workers: one row each; columns `sessions.SESSION_COLUMNS`,
            `telemetry.FINISHED_COLUMNS`, `roster.WORKER_COLUMNS`.
        any_windows: whether a window was ever seen, in the range or before it.
        unreadable: telemetry entries and worker records that are not of this release.
    """

    now_s: float
    span: Span
    since_s: float
    traffic: pd.DataFrame
    sessions: pd.DataFrame
    finished: pd.DataFrame
    workers: pd.DataFrame
    queue: QueueState
    any_windows: bool
    unreadable: int


class Feed:
    """Reads one Redis for all viewers. Safe to share between threads.

    Args:
        min_interval_s: refreshes closer together than this reuse what was read.
    """

    def __init__(self, store: BlockingStore, min_interval_s: float = 0.0) -> None:
        self._store = store
        self._min_interval_s = min_interval_s
        self._lock = threading.Lock()
        self._next_refresh_at = 0.0  # time.monotonic()
        self._now_s: float | None = None
        self._tail = Tail()
        self._roster = Roster()
        self._requests: tuple[HeldRequest, ...] = ()
        self._queue = QueueState()

    @classmethod
    def connect(cls, settings: BusSettings, min_interval_s: float = 0.0) -> Self:
        """A feed on `settings.redis_url`; talks to it at the first `refresh`."""
        return cls(BlockingStore(settings), min_interval_s)

    def close(self) -> None:
        """Close the connections; a later `refresh` opens them again."""
        self._store.close()

    def refresh(self) -> None:
        """Read what is new.

        Raises:
            StoreUnavailableError: Redis does not answer; what was read before is kept.
            ConfigurationError: Redis refuses user or password.
        """
        with self._lock:
            if time.monotonic() >= self._next_refresh_at:
                self._store.call(self._read)
                self._next_refresh_at = time.monotonic() + self._min_interval_s

    def snapshot(self, length_s: int) -> Snapshot | None:
        """The last `length_s` seconds (a key of `BIN_S`) as read; None before the first success."""
        with self._lock:
            if self._now_s is None:
                return None
            span = Span.ending_at(self._now_s, length_s)
            return Snapshot(
                now_s=self._now_s,
                span=span,
                since_s=self._tail.since_s,
                traffic=self._tail.traffic.frame(span.start_s, int(self._now_s) + 1),
                sessions=session_frame(self._requests, self._tail.progress, self._now_s),
                finished=self._tail.finished_frame(self._now_s),
                workers=self._roster.frame(self._now_s),
                queue=self._queue,
                any_windows=self._tail.any_windows,
                unreadable=self._tail.unreadable + self._roster.unreadable,
            )

    async def _read(self, store: Store) -> None:
        overview = await store.overviews.read()
        await self._read_telemetry(store, overview.now_s)
        self._roster.update(overview.workers, overview.unreadable, overview.now_s)
        self._requests, self._queue = overview.held, overview.queue
        self._now_s = overview.now_s

    async def _read_telemetry(self, store: Store, now_s: float) -> None:
        if self._tail.last_id is None:
            since_s = max(now_s - KEEP_S, await store.telemetry.complete_since_s())
            self._tail.begin(since_s, f"{int(since_s * 1000) - 1}-0")
        while True:
            assert self._tail.last_id is not None
            page = await store.telemetry.page(self._tail.last_id, _PAGE)
            self._tail.add(page)
            if len(page) < _PAGE:
                break
        self._tail.forget(now_s)
