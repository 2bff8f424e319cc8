"""Running sessions → a frame: what the queue, the edge, the controller and telemetry say of each.

Knows no Redis. Some may be missing: a session that has just begun has
no control state yet, and of one that began before the dashboard only the later windows were seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from bus.store import HeldRequest
from dashboard.telemetry import Progress, credit_of
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
        "edge": request.owner,
        "cloud": control.cloud,
        "committed": request.committed,
        "acceptance": seen.accepted / seen.drafted if seen.drafted else None,
        "threshold": _threshold(request.method, control.threshold),
        "window": control.window,
        "credit": credit_of(request.method, control.credit),
        "age_s": max(0.0, now_s - request.entered_s),
        "deliveries": request.deliveries,
    }


def _threshold(method: str, threshold: float | None) -> str | None:
    """As shown: a method that accepts by the exact rule, or whole steps by a judge, has a number
    but does not use it."""
    known = methods.find(method)
    if known is not None and known.acceptance.lossless:
        return "exact" if known.steps is None else "by judge"
    if known is not None and not known.acceptance.compares:
        return "by entropy"
    return None if threshold is None else f"{threshold:.2f}"
