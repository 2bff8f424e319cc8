"""What a dashboard shows of queue and workers, read without changing anything.

Times are Redis' clock. This module does not know how anything is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bus.protocol.requests import GenerationRequest, session_id
from bus.store.connection import CommandRefusedError, Connection
from bus.store.entries import entry_time_s, text_fields
from bus.store.keys import GROUP, Keys
from bus.store.registry import WorkerRecord, records_of
from bus.store.sessions import SessionRecord, parse_session

__all__ = ["MAX_HELD_REQUESTS", "HeldRequest", "Overview", "Overviews", "QueueState"]

MAX_HELD_REQUESTS = 200
"""Running requests looked up; all are counted."""

_DEFAULTS = GenerationRequest(id="-", prompt="-")


@dataclass(frozen=True, slots=True)
class QueueState:
    """Requests that wait and that run; seconds the oldest has waited, None where none does."""

    waiting: int = 0
    running: int = 0
    oldest_wait_s: float | None = None
    given_up: int = 0


@dataclass(frozen=True, slots=True)
class HeldRequest:
    """A request that an edge has taken up.

    Attributes:
        id: the request's.
        entered_s: when it was submitted, seconds since the epoch.
        method, client: as asked for.
        owner: the edge that holds it, None where its record is gone.
        committed: tokens streamed so far. deliveries: claims so far.
        handed_back: its edge has given it back, so that it waits again.
        control: what the controller has set, None where it has not yet.
    """

    id: str
    entered_s: float
    method: str
    client: str
    owner: str | None = None
    committed: int = 0
    deliveries: int = 1
    handed_back: bool = False
    control: SessionRecord | None = None


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything at one time.

    Attributes:
        now_s: Redis' clock, seconds since the epoch.
        workers: all records, also those that have expired and nobody has deleted yet.
        unreadable: records that are not of this release.
        held: the oldest `MAX_HELD_REQUESTS`.
    """

    now_s: float
    workers: tuple[WorkerRecord, ...]
    unreadable: int
    queue: QueueState
    held: tuple[HeldRequest, ...]


class Overviews:
    """Reads overviews. Prompt entries are read once each and remembered without their prompts.

    Every method raises StoreUnavailableError without Redis.
    """

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys
        self._entries: dict[str, Mapping[str, str]] = {}

    async def read(self) -> Overview:
        """The overview now."""
        keys = self._keys
        (seconds, micros), workers, given_up, length = await self._connection.execute_many(
            [("TIME",), ("HGETALL", keys.workers), ("XLEN", keys.dead), ("XLEN", keys.prompts)]
        )
        now_s = seconds + micros / 1e6
        group = await self._edges_group() if length else {}
        held = await self._held() if group.get("pending") else []
        back = [request for request in held if request.handed_back]
        running = group.get("pending", 0) - len(back)
        oldest_wait_s = await self._oldest_wait_s(group, back, now_s) if length > running else None
        records, unreadable = records_of(workers)
        return Overview(
            now_s=now_s,
            workers=tuple(records),
            unreadable=unreadable,
            queue=QueueState(max(0, length - running), running, oldest_wait_s, given_up),
            held=tuple(held),
        )

    async def _edges_group(self) -> dict[str, Any]:
        """XINFO GROUPS of the edges; empty where none has ever taken a request."""
        try:
            groups = await self._connection.execute("XINFO GROUPS", self._keys.prompts)
        except CommandRefusedError:  # the stream went away since XLEN
            return {}
        return next((dict(group) for group in groups if group["name"] == GROUP.encode()), {})

    async def _held(self) -> list[HeldRequest]:
        pending = await self._connection.execute(
            "XPENDING", self._keys.prompts, GROUP, "-", "+", MAX_HELD_REQUESTS, parse_detail=True
        )
        await self._read_entries([item["message_id"].decode() for item in pending])
        ids = {entry_id: fields.get("id", entry_id) for entry_id, fields in self._entries.items()}
        replies = await self._connection.execute_many(
            [
                ("HGETALL", key)
                for request in ids.values()
                for key in (self._keys.request(request), self._keys.session(session_id(request)))
            ]
        )
        return [
            _held(request, entry_id, self._entries[entry_id], text_fields(state), control)
            for (entry_id, request), state, control in zip(
                ids.items(), replies[::2], replies[1::2], strict=True
            )
        ]

    async def _read_entries(self, entry_ids: Sequence[str]) -> None:
        missing = [entry_id for entry_id in entry_ids if entry_id not in self._entries]
        found = dict(self._entries)
        for reply in await self._connection.execute_many(
            [("XRANGE", self._keys.prompts, entry_id, entry_id) for entry_id in missing]
        ):
            for entry_id, fields in reply:  # none where it has ended meanwhile
                for name in (b"prompt", b"messages", b"prompt_ids"):
                    fields.pop(name, None)
                found[entry_id.decode()] = text_fields(fields)
        self._entries = {entry_id: found[entry_id] for entry_id in entry_ids if entry_id in found}

    async def _oldest_wait_s(
        self, group: Mapping[str, Any], back: Sequence[HeldRequest], now_s: float
    ) -> float | None:
        """Seconds since the oldest waiting request came: one handed back, or the next in line."""
        after = group.get("last-delivered-id", b"0-0").decode()
        new = await self._connection.execute(
            "XRANGE", self._keys.prompts, f"({after}", "+", "COUNT", 1
        )
        entered = [entry_time_s(entry_id.decode()) for entry_id, _ in new]
        entered += [request.entered_s for request in back]
        return max((now_s - at_s for at_s in entered), default=None)


def _held(
    request: str,
    entry_id: str,
    fields: Mapping[str, str],
    state: Mapping[str, str],
    control: dict[bytes, bytes],
) -> HeldRequest:
    return HeldRequest(
        id=request,
        entered_s=entry_time_s(entry_id),
        method=fields.get("method", _DEFAULTS.method),
        client=fields.get("client", _DEFAULTS.client),
        owner=state.get("owner"),
        committed=int(state.get("next", 0)),
        deliveries=int(state.get("deliveries", 1)),
        handed_back=state.get("state") == "queued",
        control=parse_session(control),
    )
