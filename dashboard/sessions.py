"""Running sessions → a frame: what the queue, the edge, the controller and telemetry say of each.

Knows no Redis; `data` fetches the records. Some may be missing: a session that has just begun has
no control state yet, and of one that began before the dashboard only the later windows were seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bus.protocol.requests import GenerationRequest
from bus.store import SessionRecord
from dashboard.telemetry import Progress, credit_of, entry_time_s
from decoding import methods

SESSION_COLUMNS = (
    "request",
    "method",
    "client",
    "edge",
    "cloud",
    "committed",
    "acceptance",
    "threshold",
    "window",
    "credit",
    "age_s",
    "deliveries",
)

_DEFAULTS = GenerationRequest(id="-", prompt="-")


@dataclass(frozen=True, slots=True)
class HeldRequest:
    """A request that an edge has taken up.

    Attributes:
        id: the request's.
        entry_id: of its entry in the prompt stream, where it waits and runs.
        method, client: as asked for.
        state: the hash of the request: owner, streamed tokens, deliveries.
        control: what the controller has set, None where it has not yet.
    """

    id: str
    entry_id: str
    method: str
    client: str
    state: Mapping[str, str]
    control: SessionRecord | None

    @property
    def handed_back(self) -> bool:
        """Whether its edge has given it back, so that it waits again."""
        return self.state.get("state") == "queued"


def method_and_client(fields: Mapping[str, str]) -> tuple[str, str]:
    """Method and client of a prompt entry, defaults filled in."""
    return fields.get("method", _DEFAULTS.method), fields.get("client", _DEFAULTS.client)


def session_frame(
    requests: Iterable[HeldRequest], progress: Mapping[str, Progress], now_s: float
) -> pd.DataFrame:
    """One row per running request, the longest in the system first; columns `SESSION_COLUMNS`."""
    rows = [
        _row(request, progress.get(request.id, Progress()), now_s)
        for request in requests
        if not request.handed_back
    ]
    return pd.DataFrame(rows, columns=list(SESSION_COLUMNS))


def _row(request: HeldRequest, seen: Progress, now_s: float) -> dict[str, Any]:
    control = request.control or seen
    return {
        "request": request.id,
        "method": request.method,
        "client": request.client,
        "edge": request.state.get("owner"),
        "cloud": control.cloud,
        "committed": int(request.state.get("next", 0)),
        "acceptance": seen.accepted / seen.drafted if seen.drafted else None,
        "threshold": _threshold(request.method, control.threshold),
        "window": control.window,
        "credit": credit_of(request.method, control.credit),
        "age_s": max(0.0, now_s - entry_time_s(request.entry_id)),
        "deliveries": int(request.state.get("deliveries", 1)),
    }


def _threshold(method: str, threshold: float | None) -> str | None:
    """As shown: a method that accepts by the exact rule has a number but does not use it."""
    known = methods.find(method)
    if known is not None and known.lossless:
        return "exact"
    return None if threshold is None else f"{threshold:.2f}"
