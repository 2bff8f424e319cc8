"""Redis → data frames, incrementally.

One `Feed` serves every viewer of the process. It remembers the last telemetry entry it has read
and asks only for newer ones; what it read is folded into counts (`telemetry.Tail`). Everything
else it asks for is small: the registry, the queue's length, and two hashes per running session.

All times are Redis's own clock (stream ids, TIME), so that edges and dashboards whose clocks are
off still agree. Nothing is written to Redis. Knows no Streamlit and no plotly.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import msgspec
import pandas as pd
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.retry import Retry

from bus.protocol.errors import ConfigurationError, StoreUnavailableError
from bus.protocol.requests import session_id
from bus.settings import BusSettings
from bus.store import Keys, SessionRecord, session_from_fields
from bus.store.keys import GROUP
from dashboard.frames import Span
from dashboard.roster import Roster
from dashboard.sessions import HeldRequest, method_and_client, session_frame
from dashboard.telemetry import KEEP_S, Tail, entry_time_s

MAX_SESSIONS = 200
"""Running sessions looked up for the table; all are counted."""

_TIMEOUT_S = 2.0
_PAGE = 2_000
"""Telemetry entries a command: bounds the size of one reply."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """Requests that wait and that run; seconds the oldest has waited, None where none does."""

    waiting: int = 0
    running: int = 0
    oldest_wait_s: float | None = None
    given_up: int = 0


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
        client: decodes its replies to str.
        where: names the server in errors, without secrets.
        min_interval_s: refreshes closer together than this reuse what was read.
    """

    def __init__(self, client: Redis, keys: Keys, where: str, min_interval_s: float = 0.0) -> None:
        self._client = client
        self._keys = keys
        self._where = where
        self._min_interval_s = min_interval_s
        self._lock = threading.Lock()
        self._next_refresh_at = 0.0  # time.monotonic()
        self._now_s: float | None = None
        self._tail = Tail()
        self._roster = Roster()
        self._entries: dict[str, Mapping[str, str]] = {}
        self._requests: list[HeldRequest] = []
        self._queue = QueueState()

    @classmethod
    def connect(cls, settings: BusSettings, min_interval_s: float = 0.0) -> Self:
        """A feed on `settings.redis_url`; talks to it at the first `refresh`."""
        client = Redis.from_url(
            settings.redis_url,
            decode_responses=True,
            encoding_errors="replace",  # anybody can XADD any bytes; the page must survive them
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),  # once, for a connection that broke while idle
        )
        return cls(client, Keys(settings.key_prefix), settings.redacted_redis_url, min_interval_s)

    def close(self) -> None:
        """Close the connections; a later `refresh` opens them again."""
        self._client.close()

    def refresh(self) -> None:
        """Read what is new.

        Raises:
            StoreUnavailableError: Redis does not answer; what was read before is kept.
            ConfigurationError: Redis refuses user or password.
        """
        with self._lock, self._translated():
            if time.monotonic() >= self._next_refresh_at:
                self._read()
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

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (AuthenticationError, NoPermissionError) as error:
            raise ConfigurationError(
                f"Redis at {self._where} refuses us: {error}; "
                "check user and password in redis_url (E2SCI_REDIS_URL)"
            ) from error
        except (RedisError, OSError) as error:
            raise StoreUnavailableError(
                f"Redis at {self._where} does not answer: {str(error).rstrip('.')}; "
                "check that it runs and that redis_url (E2SCI_REDIS_URL) is right"
            ) from error

    def _read(self) -> None:
        pipeline = self._client.pipeline(transaction=False)
        pipeline.time()
        pipeline.hgetall(self._keys.workers)
        pipeline.xlen(self._keys.dead)
        pipeline.xlen(self._keys.prompts)
        (seconds, micros), workers, given_up, length = pipeline.execute()
        now_s = seconds + micros / 1e6
        self._read_telemetry(now_s)
        self._roster.update(workers, now_s)
        group = self._edges_group() if length else {}
        self._requests = self._read_requests() if group.get("pending") else []
        back = [request for request in self._requests if request.handed_back]
        running = group.get("pending", 0) - len(back)
        self._queue = QueueState(
            waiting=max(0, length - running),
            running=running,
            oldest_wait_s=self._oldest_wait_s(group, back, now_s) if length > running else None,
            given_up=given_up,
        )
        self._now_s = now_s

    def _read_telemetry(self, now_s: float) -> None:
        if self._tail.last_id is None:
            since_s = max(now_s - KEEP_S, self._recorded_since_s())
            self._tail.begin(since_s, f"{int(since_s * 1000) - 1}-0")
        while True:
            page = self._xrange(self._keys.telemetry, f"({self._tail.last_id}", count=_PAGE)
            self._tail.add(page)
            if len(page) < _PAGE:
                break
        self._tail.forget(now_s)

    def _recorded_since_s(self) -> float:
        """From when on the stream is complete: 0 where nothing was trimmed from it yet."""
        try:
            info = self._client.xinfo_stream(self._keys.telemetry)
        except ResponseError:  # there is no stream: nothing has happened
            return 0.0
        if info["entries-added"] == info["length"] or not info["first-entry"]:
            return 0.0
        return entry_time_s(info["first-entry"][0])

    def _edges_group(self) -> dict[str, Any]:
        """XINFO GROUPS of the edges; empty where none has ever taken a request."""
        try:
            groups = self._client.xinfo_groups(self._keys.prompts)
        except ResponseError:  # the stream went away since XLEN
            return {}
        return next((dict(group) for group in groups if group["name"] == GROUP), {})

    def _read_requests(self) -> list[HeldRequest]:
        """The requests that edges hold, oldest first."""
        pending = self._client.xpending_range(self._keys.prompts, GROUP, "-", "+", MAX_SESSIONS)
        self._read_entries([str(item["message_id"]) for item in pending])
        pipeline = self._client.pipeline(transaction=False)
        for entry_id, fields in self._entries.items():
            request = fields.get("id", entry_id)
            pipeline.hgetall(self._keys.request(request))
            pipeline.hgetall(self._keys.session(session_id(request)))
        replies = pipeline.execute()
        return [
            HeldRequest(
                fields.get("id", entry_id), entry_id, *method_and_client(fields), state,
                _parse_control(control),
            )
            for (entry_id, fields), state, control in zip(
                self._entries.items(), replies[::2], replies[1::2], strict=True
            )
        ]  # fmt: skip

    def _read_entries(self, entry_ids: list[str]) -> None:
        """Keep the fields of these prompt entries: read once each, and without the prompt."""
        missing = [entry_id for entry_id in entry_ids if entry_id not in self._entries]
        pipeline = self._client.pipeline(transaction=False)
        for entry_id in missing:
            pipeline.xrange(self._keys.prompts, min=entry_id, max=entry_id)
        found = dict(self._entries)
        for reply in pipeline.execute():
            for entry_id, fields in reply:  # none where it has ended meanwhile
                found[entry_id] = {name: text for name, text in fields.items() if name != "prompt"}
        self._entries = {entry_id: found[entry_id] for entry_id in entry_ids if entry_id in found}

    def _oldest_wait_s(
        self, group: Mapping[str, Any], back: list[HeldRequest], now_s: float
    ) -> float | None:
        """Seconds since the oldest waiting request came: one handed back, or the next in line."""
        after = group.get("last-delivered-id", "0-0")
        new = self._xrange(self._keys.prompts, f"({after}", count=1)
        ids = [entry_id for entry_id, _ in new] + [request.entry_id for request in back]
        return max((now_s - entry_time_s(entry_id) for entry_id in ids), default=None)

    def _xrange(self, stream: str, start: str, count: int) -> list[tuple[str, dict[str, str]]]:
        """XRANGE, with the types it has on a client that decodes its replies."""
        reply = self._client.xrange(stream, min=start, count=count)
        return cast("list[tuple[str, dict[str, str]]]", reply)


def _parse_control(stored: Mapping[str, str]) -> SessionRecord | None:
    if not stored:
        return None
    try:
        return session_from_fields(stored)
    except msgspec.ValidationError:  # another release's controller: show what telemetry says
        return None
