"""A child that hangs while it starts: it runs, and neither computes, reads nor writes.

Reading weights, compiling and downloading all use processor time or move bytes, however long they
take; a deadlock does neither. This module does not know what is done about it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

LEAST_CPU_S = 1.0
LEAST_BYTES = 2**20
"""What a child must use or move between two looks, else it has made no progress. A heartbeat alone
is less in a minute [ours]."""


@dataclass(frozen=True, slots=True)
class _Seen:
    pid: int
    at_s: float
    cpu_s: float
    num_bytes: int


class StallWatch:
    """Looks at children again and again; one that has made no progress for `limit_s` is stalled."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._seen: dict[str, _Seen] = {}

    def stalled(self, name: str, pid: int) -> bool:
        """Whether process `pid`, the child `name`, has made no progress within the limit."""
        now = _look(pid)
        if now is None:
            return False
        before = self._seen.get(name)
        if before is None or before.pid != pid or _progress(before, now):
            self._seen[name] = now
            return False
        return now.at_s - before.at_s >= self.limit_s


def _look(pid: int) -> _Seen | None:
    """None where it has just ended, or the system gives no such figures."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        moved = process.io_counters()
    except (psutil.Error, AttributeError, OSError):
        return None
    cpu_s = times.user + times.system + times.children_user + times.children_system
    return _Seen(pid, time.monotonic(), cpu_s, moved.read_chars + moved.write_chars)


def _progress(before: _Seen, now: _Seen) -> bool:
    return (
        now.cpu_s - before.cpu_s >= LEAST_CPU_S or now.num_bytes - before.num_bytes >= LEAST_BYTES
    )
