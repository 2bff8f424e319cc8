"""One request's answer: its pieces, its windows and its timeline, read from Redis.

For the pages that show one request. Each call reads what there is now; nothing waits. Knows no
Streamlit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from bus.protocol.requests import inner_session_id, session_id
from bus.settings import BusSettings
from bus.store import End, Store, TimelineEntry, TokensEntry, WindowEntry
from bus.store.blocking import BlockingStore
from bus.store.entries import entry_time_s

__all__ = ["Answers", "StoredAnswer", "Trail"]

_PAGE = 2_000
_MARGIN_MS = 60_000
"""Telemetry is looked for from so long before the first piece."""


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """What is known of an answer.

    Attributes:
        pieces: in order. end: None while it is being written. queue_state: `queued`, `running`,
            `done`, or empty where nobody knows the request.
    """

    request_id: str
    pieces: tuple[TokensEntry, ...] = ()
    end: End | None = None
    queue_state: str = ""

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Trail:
    """What telemetry still holds of a request, windows in order."""

    windows: tuple[WindowEntry, ...] = ()
    timeline: TimelineEntry | None = None


class Answers:
    """Reads one Redis. Safe to share between threads."""

    def __init__(self, store: BlockingStore) -> None:
        self._store = store

    @classmethod
    def connect(cls, settings: BusSettings) -> Self:
        """On `settings.redis_url`; talks to it at the first read."""
        return cls(BlockingStore(settings))

    def answer(self, request_id: str) -> StoredAnswer:
        """As far as it is written.

        Raises:
            StoreUnavailableError: Redis does not answer. ConfigurationError: it refuses us.
            RemoteError: the result was not written by this project.
        """
        entries, state = self._store.call(lambda store: store.results.so_far(request_id))
        pieces = tuple(entry for entry in entries if isinstance(entry, TokensEntry))
        ends = [entry.end for entry in entries if not isinstance(entry, TokensEntry)]
        return StoredAnswer(request_id, pieces, ends[-1] if ends else None, state)

    def trail(self, answer: StoredAnswer) -> Trail:
        """Its windows and timeline, as far as telemetry has not been trimmed.

        Raises:
            StoreUnavailableError: Redis does not answer. ConfigurationError: it refuses us.
        """
        if not answer.pieces:
            return Trail()
        return self._store.call(lambda store: _trail(store, answer))

    def story(self, request_id: str) -> dict[str, list[str]]:
        """Worker → what it saw happen to the request's session last, and to its inner session
        where it has one.

        Raises:
            StoreUnavailableError: Redis does not answer. ConfigurationError: it refuses us.
        """
        return self._store.call(lambda store: _story(store, session_id(request_id)))

    def close(self) -> None:
        """Close the connections; a later read opens them again."""
        self._store.close()


async def _story(store: Store, session: str) -> dict[str, list[str]]:
    inner = await store.stories.load(inner_session_id(session))
    return await store.stories.load(session) | {
        f"{worker} (inner session)": lines for worker, lines in inner.items()
    }


async def _trail(store: Store, answer: StoredAnswer) -> Trail:
    began_ms = round(entry_time_s(answer.pieces[0].entry_id) * 1e3) - _MARGIN_MS
    windows: list[WindowEntry] = []
    timeline, after = None, f"{max(began_ms, 0)}-0"
    while True:
        page = await store.telemetry.page(after, _PAGE, answer.request_id)
        for _, entry in page:
            if isinstance(entry, WindowEntry):
                windows.append(entry)
            elif isinstance(entry, TimelineEntry):
                timeline = entry
        if len(page) < _PAGE:
            return Trail(tuple(windows), timeline)
        after = page[-1][0]
