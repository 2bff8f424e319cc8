"""Telemetry: one capped stream with an entry per feedback and one per finished request; where it is
wished for, a session's timeline and the controller's reports.

For people and dashboards; nothing in the system acts on it. Times in `*_ms` are milliseconds,
`at_ms` is wall-clock milliseconds since the epoch.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from bus.store.connection import CommandRefusedError, Connection
from bus.store.entries import Usage, entry_time_s, text_fields
from bus.store.keys import Keys

__all__ = [
    "MAX_TELEMETRY",
    "DraftSpan",
    "PassSpan",
    "ReportEntry",
    "Rollback",
    "SessionEntry",
    "StageSpan",
    "Telemetry",
    "TelemetryEntry",
    "TimelineEntry",
    "TimelineEvent",
    "WindowEntry",
    "WindowSpan",
    "parse_telemetry",
]

MAX_TELEMETRY = 20_000
"""Entries kept, about."""

_log = logging.getLogger(__name__)


class _Entry(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    at_ms: int
    request: str
    session: str
    client: str
    edge: str
    cloud: str
    method: str

    def to_fields(self) -> dict[str, str]:
        """The fields of the stream entry; a nested struct's fields lie beside the others."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        fields |= fields.pop("usage", {})
        if "events" in fields:
            fields["events"] = msgspec.json.encode(fields["events"]).decode()
        return {name: _as_text(value) for name, value in fields.items() if value is not None}


class WindowEntry(_Entry, frozen=True, kw_only=True, tag="window"):
    """One window and its feedback, with text without a window that came before it; or, of outcome
    `own` and number 0, such text alone.

    `outcome` is a `bus.protocol.messages.Outcome` value.
    """

    incarnation: int
    number: int
    outcome: str
    num_drafted: int
    num_accepted: int
    num_committed: int
    rollback: bool
    threshold: float
    window: int
    credit: float
    draft_ms: float
    verify_ms: float
    queue_ms: float
    rtt_ms: float
    bytes_up: int
    bytes_down: int
    budget: int = 0  # tokens allowed in flight, and how many were, until this feedback; an entry
    in_flight: int = 0  # of an older release has neither
    proposed: int = 0  # tokens of the tree in the pass, of which num_drafted is then the depth


class SessionEntry(_Entry, frozen=True, kw_only=True, tag="session"):
    """One finished request."""

    finish_reason: str
    usage: Usage


class DraftSpan(msgspec.Struct, frozen=True, array_like=True, tag="draft"):
    """The draft wrote `num_tokens` tokens from position `start`."""

    at_ms: float
    end_ms: float
    start: int
    num_tokens: int


class WindowSpan(msgspec.Struct, frozen=True, array_like=True, tag="window"):
    """A window was in flight, from its first sending to its feedback.

    `outcome` is a `bus.protocol.messages.Outcome` value, or `dropped` where an earlier window's
    rejection made it void. `pass_tokens` is above 0 where a target pass began with it; `rtt_ms` is
    the round trip as it was last measured.
    """

    at_ms: float
    number: int
    start: int
    num_tokens: int
    end_ms: float = 0.0
    outcome: str = ""
    num_accepted: int = 0
    verify_ms: float = 0.0
    queue_ms: float = 0.0
    pass_tokens: int = 0
    rtt_ms: float = 0.0


class PassSpan(msgspec.Struct, frozen=True, array_like=True, tag="pass"):
    """The target wrote by itself; placed in time as if its feedback took half a round trip.

    With a tree of its speculator in the pass, `proposed` tokens of `depth`, it accepted a path of
    `num_accepted`.
    """

    at_ms: float
    end_ms: float
    num_tokens: int
    proposed: int = 0
    depth: int = 0
    num_accepted: int = 0


class Rollback(msgspec.Struct, frozen=True, array_like=True, tag="rollback"):
    """The text was cut back to `length` tokens, the prompt and the correction included."""

    at_ms: float
    length: int


class StageSpan(msgspec.Struct, frozen=True, array_like=True, tag="stage"):
    """A pass of a middle model over `pass_tokens` tokens, `num_accepted` of them drafts that it
    accepted; placed in time as `PassSpan`."""

    at_ms: float
    end_ms: float
    pass_tokens: int
    num_accepted: int
    worker: str


TimelineEvent = DraftSpan | WindowSpan | PassSpan | Rollback | StageSpan


class TimelineEntry(_Entry, frozen=True, kw_only=True, tag="timeline"):
    """One session's timeline (`edge_worker.timeline`), times in ms from its beginning.

    In the stream `events` is a JSON list of lists: `["draft", at_ms, end_ms, …]`.
    """

    events: tuple[TimelineEvent, ...]


class ReportEntry(_Entry, frozen=True, kw_only=True, tag="report"):
    """A window's report to the controller (`bus.protocol.messages.WindowReport`), with the
    session's credit before it: r̂ and Δr̂. The controller does not know the request, which stays
    empty.
    """

    incarnation: int
    number: int
    outcome: str
    num_drafted: int
    num_accepted: int
    num_own: int
    threshold: float
    credit: float
    credit_delta: float
    expected_accepted: float
    num_scored: int
    log_likelihood: float
    num_greedy: int
    regret: float
    edge_ms: float
    cloud_ms: float
    rework_ms: float
    verify_ms: float
    queue_ms: float
    mean_jsd: float | None = None  # none where windows carry no distributions
    energy_j: float | None = None


TelemetryEntry = WindowEntry | SessionEntry | TimelineEntry | ReportEntry
_KINDS: dict[str, type[WindowEntry | ReportEntry]] = {
    "window": WindowEntry, "report": ReportEntry,
}  # fmt: skip


class Telemetry:
    """Add and read. Every method raises StoreUnavailableError without Redis."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._key = keys.telemetry

    async def add(self, *entries: TelemetryEntry) -> None:
        """Add entries in one round trip. Where a reply is lost, an entry may appear twice."""
        await self._connection.execute_many(
            [
                (
                    "XADD",
                    self._key,
                    "MAXLEN",
                    "~",
                    MAX_TELEMETRY,
                    "*",
                    *(word for pair in entry.to_fields().items() for word in pair),
                )
                for entry in entries
            ]
        )

    async def read(
        self, after: str = "0", count: int = MAX_TELEMETRY
    ) -> list[tuple[str, TelemetryEntry]]:
        """Up to `count` entries after the entry id `after`, oldest first, with their ids.

        Entries this version cannot read are skipped, with a line in the log.
        """
        page = await self.page(after, count)
        return [(entry_id, entry) for entry_id, entry in page if entry is not None]

    async def page(
        self, after: str, count: int, request: str | None = None
    ) -> list[tuple[str, TelemetryEntry | None]]:
        """As `read`, with None for each entry that this version cannot read.

        Args:
            request: None too for what is about another request; it is not even parsed.
        """
        reply = await self._connection.execute(
            "XRANGE", self._key, f"({after}", "+", "COUNT", count
        )
        wanted = None if request is None else request.encode()
        return [
            (
                entry_id.decode(),
                parse_telemetry(entry_id, text_fields(fields))
                if wanted is None or fields.get(b"request") == wanted
                else None,
            )
            for entry_id, fields in reply
        ]

    async def complete_since_s(self) -> float:
        """From when on the stream is complete, seconds since the epoch: 0 where nothing has been
        trimmed yet."""
        try:
            info = await self._connection.execute("XINFO STREAM", self._key)
        except CommandRefusedError:  # there is no stream: nothing has happened
            return 0.0
        if info["entries-added"] == info["length"] or not info["first-entry"]:
            return 0.0
        return entry_time_s(info["first-entry"][0].decode())


def parse_telemetry(entry_id: bytes, fields: dict[str, str]) -> TelemetryEntry | None:
    """One entry of the stream; None, with a line in the log, where this version cannot read it."""
    try:
        if fields.get("kind") == "session":
            usage = {name: fields[name] for name in Usage.__struct_fields__ if name in fields}
            return msgspec.convert({**fields, "usage": usage}, SessionEntry, strict=False)
        if fields.get("kind") == "timeline":
            events = msgspec.json.decode(fields["events"])
            return msgspec.convert({**fields, "events": events}, TimelineEntry, strict=False)
        return msgspec.convert(fields, _KINDS[fields["kind"]], strict=False)
    except (KeyError, msgspec.DecodeError) as error:
        _log.warning("telemetry entry %s skipped: %s", entry_id.decode(), error)
        return None


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
