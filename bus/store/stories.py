"""Sessions' stories: what each worker saw happen to a session last, for people.

A worker writes the stories of its sessions once a second, those that have changed, and the last
state of those that have ended. Nothing in the system reads them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import msgspec

from bus.protocol.errors import StoreUnavailableError
from bus.settings import BusSettings
from bus.store.connection import Connection
from bus.store.keys import Keys

__all__ = ["Stories", "StoryWriter", "story_from_fields"]

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
MOST_ENDED = 1000
"""Stories of ended sessions that wait for Redis; the oldest give way."""


class Told(Protocol):
    """A story as `decoding.story` keeps it."""

    @property
    def num_events(self) -> int: ...

    def lines(self) -> list[str]: ...


class Stories:
    """Save and load. Every method raises StoreUnavailableError without Redis."""

    def __init__(self, connection: Connection, keys: Keys, settings: BusSettings) -> None:
        self._connection = connection
        self._keys = keys
        self._ttl_s = settings.result_ttl_s

    async def save(self, session: str, worker: str, lines: list[str]) -> None:
        """What `worker` saw, in place of what it said before."""
        key = self._keys.story(session)
        await self._connection.execute_many(
            [("HSET", key, worker, msgspec.json.encode(lines)), ("EXPIRE", key, self._ttl_s)]
        )

    async def load(self, session: str) -> dict[str, list[str]]:
        """Worker → lines; empty where nobody knows the session."""
        return story_from_fields(
            await self._connection.execute("HGETALL", self._keys.story(session))
        )


def story_from_fields(fields: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The stories in a hash, by worker; what cannot be read is left out, with a line in the log."""
    told: dict[str, list[str]] = {}
    for worker, data in sorted(fields.items()):
        try:
            told[worker.decode("utf-8", "replace")] = msgspec.json.decode(data, type=list[str])
        except msgspec.DecodeError as error:
            log.warning("story of %r skipped: %s", worker, error)
    return told


class StoryWriter:
    """Writes what has changed of one worker's stories."""

    def __init__(self, stories: Stories, worker: str) -> None:
        self._stories = stories
        self._worker = worker
        self._written: dict[str, int] = {}
        self._ended: dict[str, Told] = {}

    def ended(self, session: str, story: Told) -> None:
        """The session is over; its story is written once more."""
        self._ended[session] = story
        if len(self._ended) > MOST_ENDED:
            del self._ended[next(iter(self._ended))]

    async def run_forever(self, running: Callable[[], Iterable[tuple[str, Told]]]) -> None:
        """Write once a second; while Redis is away stories wait."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.write(running())
            except StoreUnavailableError as error:
                log.debug("stories wait: %s", error)

    async def write(self, running: Iterable[tuple[str, Told]]) -> None:
        """Write those of running sessions that have changed, and those that have ended."""
        now = dict(running)
        self._written = {name: count for name, count in self._written.items() if name in now}
        for name, story in now.items():
            if self._written.get(name) != story.num_events:
                await self._stories.save(name, self._worker, story.lines())
                self._written[name] = story.num_events
        for name, story in list(self._ended.items()):
            await self._stories.save(name, self._worker, story.lines())
            if self._ended.get(name) is story:
                del self._ended[name]
