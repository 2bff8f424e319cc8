"""The telemetry stream, folded as it is read: counts per second, running progress, last answers.

`Tail` is fed stream entries and forgets them at once. Knows no Redis connection, no charts.
Times are those of the entries' ids, which Redis gives: one clock for all edges.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import pandas as pd

from bus.store import SessionEntry, TelemetryEntry, WindowEntry
from bus.store.entries import entry_time_s
from dashboard.frames import BIN_S, Traffic
from decoding import methods
from decoding.methods.base import Control

KEEP_S = max(BIN_S) + max(BIN_S.values())
"""Seconds of counts kept: the longest range on the page and its unfinished bin."""

_PROGRESS_KEEP_S = 600
_MAX_FINISHED = 50

FINISHED_COLUMNS = (
    "ended_s_ago",
    "request",
    "method",
    "client",
    "edge",
    "finish_reason",
    "tokens",
    "tokens_per_s",
    "seconds",
    "acceptance",
    "rollbacks",
)


@dataclass(slots=True)
class Progress:
    """What the windows of one running request have said so far; `at_s` is the last one's time."""

    cloud: str | None = None
    drafted: int = 0
    accepted: int = 0
    threshold: float | None = None
    window: int | None = None
    credit: float | None = None
    at_s: float = 0.0


class Tail:
    """All that is kept of the telemetry stream. Mutable; whoever shares it holds a lock.

    Attributes:
        last_id: id of the last entry read, None before `begin`.
        since_s: from here on the record is complete; before it, nothing is known.
        any_windows: whether any window was ever read.
        unreadable: entries that are not of this release, skipped.
    """

    def __init__(self) -> None:
        self.last_id: str | None = None
        self.since_s = 0.0
        self.any_windows = False
        self.unreadable = 0
        self.traffic = Traffic()
        self.progress: dict[str, Progress] = {}
        self._finished: deque[tuple[float, SessionEntry]] = deque(maxlen=_MAX_FINISHED)

    def begin(self, since_s: float, last_id: str) -> None:
        """Set out to read the entries after `last_id`; none before `since_s` will come."""
        self.since_s = since_s
        self.last_id = last_id

    def add(self, entries: Iterable[tuple[str, TelemetryEntry | None]]) -> None:
        """Fold stream entries in, oldest first; None is one that this release cannot read."""
        for entry_id, entry in entries:
            self.last_id = entry_id
            at_s = entry_time_s(entry_id)
            match entry:
                case None:
                    self.unreadable += 1
                case SessionEntry():
                    self.progress.pop(entry.request, None)
                    self._finished.append((at_s, entry))
                case WindowEntry():
                    self._add_window(at_s, entry)

    def _add_window(self, at_s: float, entry: WindowEntry) -> None:
        self.any_windows = True
        self.traffic.add(
            int(at_s),
            entry.edge,
            entry.method,
            drafted=entry.num_drafted,
            accepted=entry.num_accepted,
            committed=entry.num_committed,
            rollback=entry.rollback,
            in_flight=entry.in_flight,
            credit=credit_of(entry.method, entry.credit),
            threshold=None if _has_no_threshold(entry.method) else entry.threshold,
        )
        seen = self.progress.setdefault(entry.request, Progress())
        seen.at_s = at_s
        seen.cloud = entry.cloud
        seen.drafted += entry.num_drafted
        seen.accepted += entry.num_accepted
        seen.threshold, seen.window = entry.threshold, entry.window
        seen.credit = credit_of(entry.method, entry.credit)

    def forget(self, now_s: float) -> None:
        """Drop what no chart or table can show any more."""
        self.traffic.forget_before(int(now_s) - KEEP_S)
        stale = [
            request
            for request, seen in self.progress.items()
            if seen.at_s < now_s - _PROGRESS_KEEP_S
        ]
        for request in stale:
            del self.progress[request]

    def finished_frame(self, now_s: float) -> pd.DataFrame:
        """The last answers, newest first; columns `FINISHED_COLUMNS`."""
        rows = [
            (
                max(0.0, now_s - at_s),
                entry.request,
                entry.method,
                entry.client,
                entry.edge,
                entry.finish_reason,
                entry.usage.completion_tokens,
                entry.usage.tokens_per_s,
                entry.usage.seconds,
                entry.usage.acceptance if entry.usage.drafted_tokens else None,
                entry.usage.rollbacks,
            )
            for at_s, entry in reversed(self._finished)
        ]
        return pd.DataFrame(rows, columns=list(FINISHED_COLUMNS))


def credit_of(method: str, credit: float | None) -> float | None:
    """None where the controller keeps none for this method and reports 0."""
    return credit if _follows_credit(method) else None


@cache
def _follows_credit(method: str) -> bool:
    """Whether the controller keeps credit for it; of an unknown method it may."""
    known = methods.find(method)
    return known is None or known.control is not Control.FIXED


@cache
def _has_no_threshold(method: str) -> bool:
    """Of a method that is known here: a threshold says nothing of it."""
    known = methods.find(method)
    return known is not None and not known.acceptance.compares
