"""The workers: who is up, and who was a moment ago.

A worker that stops in order takes its record away; one that dies leaves a record that expires and
is then deleted by whoever reads the registry next. The roster remembers the second kind for a
while, since a row that just vanishes is how a failure goes unnoticed. Knows no Redis; all times
are Redis's clock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

from bus.store import TIME_TO_LIVE_S, Role, WorkerRecord

WORKER_COLUMNS = (
    "worker",
    "role",
    "status",
    "heartbeat_age_s",
    "load",
    "model",
    "hardware",
    "counters",
)
UP = "up"
DOWN = "down"

REMEMBER_DOWN_S = 600.0
_ROLES = (Role.CONTROLLER, Role.CLOUD, Role.MIDDLE, Role.EDGE)
_ORDER = {role: place for place, role in enumerate(_ROLES)}


class Roster:
    """Worker records by id, the lately dead included. Mutable; whoever shares it holds a lock.

    Attributes:
        unreadable: records in the registry now that are not of this release.
    """

    def __init__(self) -> None:
        self.unreadable = 0
        self._records: dict[str, WorkerRecord] = {}

    def update(self, records: Iterable[WorkerRecord], unreadable: int, now_s: float) -> None:
        """Take over what the registry holds at `now_s`, expired records too."""
        present = {record.worker_id: record for record in records}
        self.unreadable = unreadable
        dead = {
            worker_id: record
            for worker_id, record in self._records.items()
            if record.expires_at <= now_s  # gone before that means that it said goodbye
        }
        self._records = {
            worker_id: record
            for worker_id, record in {**dead, **present}.items()
            if record.expires_at > now_s - REMEMBER_DOWN_S
        }

    def frame(self, now_s: float) -> pd.DataFrame:
        """One row per worker, columns `WORKER_COLUMNS`: by role (`_ROLES`), then by number."""
        records = sorted(
            self._records.values(),
            key=lambda record: (_ORDER[record.role], _natural(record.worker_id)),
        )
        rows = [_row(record, now_s) for record in records]
        return pd.DataFrame(rows, columns=list(WORKER_COLUMNS))


def _row(record: WorkerRecord, now_s: float) -> tuple[object, ...]:
    return (
        record.worker_id,
        record.role.value,
        UP if record.expires_at > now_s else DOWN,
        max(0.0, now_s - (record.expires_at - TIME_TO_LIVE_S)),
        f"{record.load} of {record.capacity}" if record.capacity else None,
        record.model or None,
        " on ".join(filter(None, (record.number_format, record.device))) or None,
        ", ".join(f"{name} {count}" for name, count in sorted(record.counters.items())) or None,
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which edge-2 comes before edge-10."""
    return [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)
    ]
