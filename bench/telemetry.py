"""What a stack's workers have told about themselves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from bus.settings import BusSettings
from bus.store import ReportEntry, Store, TelemetryEntry, TimelineEntry, WindowEntry

_POLL_S = 0.05


async def read_telemetry(redis_url: str) -> list[TelemetryEntry]:
    """All entries that Redis holds, oldest first."""
    store = await Store.connect(BusSettings.load(redis_url=redis_url))
    try:
        entries: list[TelemetryEntry] = []
        after = "0"
        while batch := await store.telemetry.read(after):
            after = batch[-1][0]
            entries += [entry for _, entry in batch]
        return entries
    finally:
        await store.close()


async def newest_entry(store: Store, after: str = "0") -> str:
    """Id of the newest entry, or `after` where there is none after it."""
    while batch := await store.telemetry.read(after):
        after = batch[-1][0]
    return after


@dataclass(frozen=True, slots=True)
class Told:
    """Of one session: its judged windows in order, the controller's reports of them by incarnation
    and number, and its timeline where one is kept."""

    windows: tuple[WindowEntry, ...]
    reports: dict[tuple[int, int], ReportEntry]
    timeline: TimelineEntry | None


async def told_of(
    store: Store, session: str, after: str, wait_s: float, with_timeline: bool = False
) -> Told:
    """What there is of a finished session after the entry `after`.

    Reports come by another way than the answer, and may come a little later: they are waited for,
    the timeline too where it is wanted, for at most `wait_s` seconds.
    """
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        entries = [e for _, e in await store.telemetry.read(after) if e.session == session]
        windows = tuple(e for e in entries if isinstance(e, WindowEntry) and e.num_drafted)
        reports = {
            (e.incarnation, e.number): e
            for e in entries
            if isinstance(e, ReportEntry) and e.num_drafted
        }
        timeline = next((e for e in entries if isinstance(e, TimelineEntry)), None)
        complete = all((w.incarnation, w.number) in reports for w in windows)
        if with_timeline and timeline is None:
            complete = False
        if complete or asyncio.get_running_loop().time() > deadline:
            return Told(windows, reports, timeline)
        await asyncio.sleep(_POLL_S)
