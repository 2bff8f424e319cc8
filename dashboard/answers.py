"""One request's answer: its pieces, its windows and its timeline, read from Redis.

For the pages that show one request. Each call reads what there is now; nothing waits. Knows no
Streamlit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from redis.retry import Retry

from bus.errors import ConfigurationError, RemoteError, StoreUnavailableError
from bus.requests import session_id
from bus.settings import BusSettings
from bus.store import End, Keys, TimelineEntry, WindowEntry, story_from_fields
from bus.store.entries import TokensEntry, parse_result_entry, text_fields
from bus.store.telemetry import parse_telemetry

_TIMEOUT_S = 2.0
_PAGE = 2_000
_MARGIN_MS = 60_000
"""Telemetry is looked for from so long before the first piece."""


@dataclass(frozen=True, slots=True)
class Answer:
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
    """Reads one Redis. Safe to share between threads.

    Args:
        client: does not decode its replies.
        where: names the server in errors, without secrets.
    """

    def __init__(self, client: Redis, keys: Keys, where: str) -> None:
        self._client = client
        self._keys = keys
        self._where = where

    @classmethod
    def connect(cls, settings: BusSettings) -> Self:
        """On `settings.redis_url`; talks to it at the first read."""
        client = Redis.from_url(
            settings.redis_url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
        )  # fmt: skip
        return cls(client, Keys(settings.key_prefix), settings.redacted_redis_url)

    def answer(self, request_id: str) -> Answer:
        """As far as it is written.

        Raises:
            StoreUnavailableError: Redis does not answer. ConfigurationError: it refuses us.
            RemoteError: the result was not written by this project.
        """
        pipeline = self._client.pipeline(transaction=False)
        pipeline.xrange(self._keys.result(request_id))
        pipeline.hget(self._keys.request(request_id), "state")
        entries, state = self._reply(pipeline.execute)
        pieces: list[TokensEntry] = []
        end = None
        for entry_id, fields in entries:
            entry = parse_result_entry(entry_id, fields)
            if isinstance(entry, TokensEntry):
                pieces.append(entry)
            else:
                end = entry.end
        return Answer(request_id, tuple(pieces), end, (state or b"").decode())

    def trail(self, answer: Answer) -> Trail:
        """Its windows and timeline, as far as telemetry has not been trimmed.

        Raises:
            StoreUnavailableError: Redis does not answer. ConfigurationError: it refuses us.
        """
        if not answer.pieces:
            return Trail()
        began_ms = int(answer.pieces[0].entry_id.partition("-")[0]) - _MARGIN_MS
        windows: list[WindowEntry] = []
        timeline, after = None, f"{max(began_ms, 0)}-0"
        while True:
            page = self._reply(
                lambda after=after: self._client.xrange(
                    self._keys.telemetry, min=f"({after}", count=_PAGE
                )
            )
            for entry_id, fields in page:
                if fields.get(b"request") != answer.request_id.encode():
                    continue
                entry = parse_telemetry(entry_id, text_fields(fields))
                if isinstance(entry, WindowEntry):
                    windows.append(entry)
                elif isinstance(entry, TimelineEntry):
                    timeline = entry
            if len(page) < _PAGE:
                return Trail(tuple(windows), timeline)
            after = page[-1][0].decode()

    def story(self, request_id: str) -> dict[str, list[str]]:
        """Worker → what it saw happen to the request's session last.

        Raises:
            StoreUnavailableError: Redis does not answer. ConfigurationError: it refuses us.
        """
        key = self._keys.story(session_id(request_id))
        return story_from_fields(self._reply(lambda: self._client.hgetall(key)))

    def close(self) -> None:
        """Close the connections; a later read opens them again."""
        self._client.close()

    def _reply(self, ask: Any) -> Any:
        try:
            return ask()
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


__all__ = ["Answer", "Answers", "RemoteError", "Trail"]
