"""The figures at the top of the page and the warnings above them, as text. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from dashboard.data import Snapshot
from dashboard.frames import Totals
from dashboard.glossary import TERMS
from dashboard.roster import DOWN, UP

NOW_S = 10
"""Seconds over which "now" is averaged: some windows of a slow session, still this moment."""

NONE = "–"
_REQUIRED = ("edge", "cloud")
_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure with its unit, and the help that explains it."""

    label: str
    value: str
    help: str


def of(snapshot: Snapshot) -> list[Tile]:
    """The tiles, most important first."""
    now_s = int(snapshot.now_s)
    now = Totals.of(snapshot.traffic, now_s - NOW_S, now_s)
    span = snapshot.span.clipped(snapshot.since_s)
    shown = Totals.of(snapshot.traffic, span.start_s, now_s + 1)  # this second's windows too
    queue = snapshot.queue
    waited = "" if queue.oldest_wait_s is None else f" · {duration(queue.oldest_wait_s)}"
    up, known = workers_up(snapshot)
    return [
        Tile(
            "Tokens per s, now",
            number(now.goodput or 0.0),
            f"{TERMS['goodput']} Tokens per second, over the last {NOW_S} s.",
        ),
        Tile("Acceptance", percent(shown.acceptance), _over_range(TERMS["acceptance"])),
        Tile(
            "Rollbacks per min",
            number(shown.rollbacks_per_min or 0.0),
            _over_range(TERMS["rollback"]),
        ),
        Tile("Rolled back", percent(shown.rollback_share), _over_range(TERMS["rollback share"])),
        Tile("Sessions running", str(queue.running), TERMS["session"]),
        Tile(
            "Waiting · oldest" if waited else "Waiting",
            f"{queue.waiting}{waited}",
            TERMS["queue"],
        ),
        Tile("Workers up", f"{up} of {known}" if known else "0", TERMS["heartbeat"]),
    ]


def notices(snapshot: Snapshot) -> list[str]:
    """What is wrong, in sentences that say what to do."""
    workers, queue = snapshot.workers, snapshot.queue
    found = []
    down = workers[workers["status"] == DOWN]
    if not down.empty:
        names = [
            f"`{worker}` (silent for {duration(age_s)})"
            for worker, age_s in zip(down["worker"], down["heartbeat_age_s"], strict=True)
        ]
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        found.append(
            f"Down: {', '.join(names[:_MAX_NAMED])}{more}. Other workers of the same role take "
            "over their prompts."
        )
    living = set(workers.loc[workers["status"] == UP, "role"])
    missing = [role for role in _REQUIRED if role not in living]
    if missing:
        found.append(
            f"No {' and no '.join(missing)} worker is up, so no prompt can be answered. "
            "`e2sci up` starts one of each."
        )
    if queue.given_up:
        found.append(f"Given up so far: {queue.given_up}. {TERMS['given up']}")
    if snapshot.unreadable:
        found.append(
            f"Records that could not be read: {snapshot.unreadable}. Workers of another release "
            "use the same Redis; run one release everywhere."
        )
    return found


def workers_up(snapshot: Snapshot) -> tuple[int, int]:
    """Workers up, and workers known."""
    status = snapshot.workers["status"]
    return int((status == UP).sum()), len(status)


def percent(share: float | None) -> str:
    """0.873 → "87 %"; a dash where there is nothing to divide."""
    return NONE if share is None else f"{share:.0%}".replace("%", " %")


def number(value: float) -> str:
    """Three digits are enough at a glance: 0.4, 60.5, 405."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds → "4 s", "3 min", "2.5 h": two digits are enough at a glance."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _over_range(text: str) -> str:
    return f"{text} Over the time range chosen above."
