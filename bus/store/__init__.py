"""What is kept in Redis: the prompt queue, results, registry, sessions, telemetry.

    store = await Store.connect(settings)
    claim = await store.queue.take("edge-1", block_ms=1000)
    ...
    await store.close()

Needs Redis 7.0 or newer, or Valkey; one server, not a cluster. Everything that must hold when
processes die is a script in `scripts/`; each says at its top what it guarantees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from bus.settings import BusSettings
from bus.store.connection import MAX_BLOCK_MS, CommandRefusedError, Connection
from bus.store.entries import (
    Alternative,
    End,
    EndEntry,
    FinishReason,
    ScoredToken,
    TokensEntry,
    Usage,
)
from bus.store.keys import Keys
from bus.store.overview import MAX_HELD_REQUESTS, HeldRequest, Overview, Overviews, QueueState
from bus.store.queue import Claim, Queue, QueueDepth
from bus.store.registry import HEARTBEAT_S, TIME_TO_LIVE_S, Registry, Role, WorkerRecord
from bus.store.results import ResultGapError, Results
from bus.store.sessions import SessionRecord, Sessions, session_from_fields
from bus.store.stories import Stories, StoryWriter, story_from_fields
from bus.store.telemetry import (
    DraftSpan,
    PassSpan,
    ReportEntry,
    Rollback,
    SessionEntry,
    StageSpan,
    Telemetry,
    TelemetryEntry,
    TimelineEntry,
    TimelineEvent,
    WindowEntry,
    WindowSpan,
)
from bus.store.tuning import InUse, Tuning, Tunings, Wish, decode_wish

__all__ = [
    "HEARTBEAT_S",
    "MAX_BLOCK_MS",
    "MAX_HELD_REQUESTS",
    "TIME_TO_LIVE_S",
    "Alternative",
    "Claim",
    "CommandRefusedError",
    "DraftSpan",
    "End",
    "EndEntry",
    "FinishReason",
    "HeldRequest",
    "InUse",
    "Keys",
    "Overview",
    "PassSpan",
    "QueueDepth",
    "QueueState",
    "ReportEntry",
    "ResultGapError",
    "Role",
    "Rollback",
    "ScoredToken",
    "SessionEntry",
    "SessionRecord",
    "StageSpan",
    "Store",
    "Stories",
    "StoryWriter",
    "TelemetryEntry",
    "TimelineEntry",
    "TimelineEvent",
    "TokensEntry",
    "Tuning",
    "Usage",
    "WindowEntry",
    "WindowSpan",
    "Wish",
    "WorkerRecord",
    "decode_wish",
    "session_from_fields",
    "story_from_fields",
]


class Store:
    """Everything Redis holds for us, by topic. Use it within one event loop."""

    def __init__(self, settings: BusSettings) -> None:
        """Make a store without talking to Redis yet; `connect` also checks that it answers."""
        keys = Keys(settings.key_prefix)
        self._connection = Connection(settings)
        self.queue = Queue(self._connection, keys, settings)
        self.results = Results(self._connection, keys)
        self.registry = Registry(self._connection, keys)
        self.sessions = Sessions(self._connection, keys, settings)
        self.stories = Stories(self._connection, keys, settings)
        self.telemetry = Telemetry(self._connection, keys)
        self.tunings = Tunings(self._connection, keys)
        self.overviews = Overviews(self._connection, keys)

    @classmethod
    async def connect(cls, settings: BusSettings) -> Self:
        """A store whose Redis answers.

        Raises:
            StoreUnavailableError: it does not.
            ConfigurationError: it refuses our user or password.
        """
        store = cls(settings)
        try:
            await store.ping()
        except BaseException:
            await store.close()
            raise
        return store

    async def ping(self) -> None:
        """Return once Redis has answered. Raises StoreUnavailableError."""
        await self._connection.execute("PING")

    async def close(self) -> None:
        """Close all connections."""
        await self._connection.close()

    async def commit_window(
        self,
        claim: Claim,
        start: int,
        tokens: Sequence[int],
        accepted: Sequence[bool],
        text: str,
        entry: WindowEntry,
        lengths: Sequence[int] = (),
        probe: str = "",
        scores: Sequence[ScoredToken] = (),
        prompt_scores: Sequence[ScoredToken] = (),
    ) -> None:
        """`results.append` and the window's telemetry entry in one step and one round trip.

        A repeat doubles neither. Raises as `Results.append`; then neither is written.
        """
        await self.results.append(
            claim, start, tokens, accepted, text, lengths, entry.to_fields(), probe, scores,
            prompt_scores,
        )  # fmt: skip
