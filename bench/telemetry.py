"""What a stack's workers have told about themselves."""

from __future__ import annotations

from bus.settings import BusSettings
from bus.store import Store, TelemetryEntry


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
