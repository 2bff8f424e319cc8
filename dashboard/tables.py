"""The tables of the page: which columns, under which names, with which help. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from streamlit import column_config as column

from bus.store import MAX_HELD_REQUESTS
from dashboard.charts import method_label
from dashboard.data import Snapshot
from dashboard.glossary import TERMS
from dashboard.roster import DOWN
from dashboard.tiles import duration

Formats = dict[str, Callable[[Any], str]]


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table; `when_empty` is shown in place of no rows."""

    title: str
    help: str
    when_empty: str
    rows: pd.DataFrame
    columns: dict[str, Any]


def of(snapshot: Snapshot) -> list[Table]:
    """The tables, in the page's order."""
    return [sessions(snapshot), workers(snapshot), finished(snapshot)]


def sessions(snapshot: Snapshot) -> Table:
    """Running sessions."""
    rows = _shown(
        snapshot.sessions,
        {"method": method_label, "acceptance": _percent, "age_s": duration},
    )
    hidden = snapshot.queue.running - len(rows)
    more = f" The first {MAX_HELD_REQUESTS} are listed." if hidden > 0 else ""
    return Table(
        "Sessions running",
        TERMS["session"] + more,
        "No session is running.",
        rows,
        {
            "request": column.TextColumn("Request", width="small", pinned=True),
            "method": column.TextColumn("Method", help=TERMS["lossless"]),
            "client": column.TextColumn("Client", help=TERMS["client"]),
            "edge": column.TextColumn("Edge", help=TERMS["edge"]),
            "cloud": column.TextColumn("Cloud", help=TERMS["cloud"]),
            "committed": column.NumberColumn("Committed", help=TERMS["committed"], format="%d tok"),
            "acceptance": column.TextColumn("Acceptance", help=TERMS["acceptance"]),
            "threshold": column.TextColumn("Threshold", help=TERMS["threshold"]),
            "window": column.NumberColumn("Window", help=TERMS["window"], format="%d tok"),
            "credit": column.NumberColumn("Credit", help=TERMS["credit"], format="%.2f"),
            "age_s": column.TextColumn("Age", help="Time since the prompt was submitted."),
            "deliveries": column.NumberColumn("Deliveries", help=TERMS["delivery"]),
        },
    )


def workers(snapshot: Snapshot) -> Table:
    """Workers, the lately dead included."""
    rows = _shown(snapshot.workers, {"status": _status, "heartbeat_age_s": _age})
    return Table(
        "Workers",
        TERMS["heartbeat"],
        "No worker has registered. `e2sci up` starts them.",
        rows,
        {
            "worker": column.TextColumn("Worker", pinned=True),
            "role": column.TextColumn("Role", help=TERMS["role"]),
            "status": column.TextColumn("Status", help=TERMS["heartbeat"]),
            "heartbeat_age_s": column.TextColumn("Heartbeat age", help=TERMS["heartbeat"]),
            "load": column.TextColumn("Sessions", help=TERMS["load"]),
            "model": column.TextColumn("Model"),
            "hardware": column.TextColumn("Runs as", help="Number format and device."),
            "counters": column.TextColumn("Counters", help=TERMS["counters"], width="medium"),
        },
    )


def finished(snapshot: Snapshot) -> Table:
    """The last answers."""
    rows = _shown(
        snapshot.finished,
        {
            "ended_s_ago": lambda seconds: f"{duration(seconds)} ago",
            "method": method_label,
            "acceptance": _percent,
        },
    )
    return Table(
        "Finished lately",
        "The last answers, newest first.",
        "No answer has ended yet.",
        rows,
        {
            "ended_s_ago": column.TextColumn("Ended", width="small"),
            "request": column.TextColumn("Request", width="small"),
            "method": column.TextColumn("Method", help=TERMS["lossless"]),
            "client": column.TextColumn("Client", help=TERMS["client"]),
            "edge": column.TextColumn("Edge", help=TERMS["edge"]),
            "finish_reason": column.TextColumn("Ended by", help=TERMS["finish reason"]),
            "tokens": column.NumberColumn("Answer", format="%d tok"),
            "tokens_per_s": column.NumberColumn(
                "Goodput", help=TERMS["goodput"], format="%.1f tok/s"
            ),
            "seconds": column.NumberColumn("Time taken", format="%.1f s"),
            "acceptance": column.TextColumn("Acceptance", help=TERMS["acceptance"]),
            "rollbacks": column.NumberColumn("Rollbacks", help=TERMS["rollback"]),
        },
    )


def _shown(frame: pd.DataFrame, formats: Formats) -> pd.DataFrame:
    """A copy in which the named columns are text; missing values stay missing."""
    texts = {
        name: frame[name].map(write, na_action="ignore").astype(object)
        for name, write in formats.items()
    }
    return frame.assign(**texts)


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def _age(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def _status(status: str) -> str:
    return "⚠ down" if status == DOWN else status
