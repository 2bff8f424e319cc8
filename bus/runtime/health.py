"""Health check of a worker in a container: `python -m bus.runtime.health` exits with 0 or 1.

A worker is well while its heartbeat in the registry is live: its event loop runs and it reaches
Redis. The check runs beside the worker, with the same host name and environment, and so finds the
worker's id by the same rule. It does not know whether the worker has anything to do.
"""

from __future__ import annotations

import asyncio
import sys

from bus.protocol.errors import ConfigurationError, StoreUnavailableError
from bus.runtime.worker import WorkerSettings
from bus.store import Role, Store

__all__ = ["is_alive", "main"]


async def is_alive(settings: WorkerSettings) -> bool:
    """Whether a worker that these settings belong to has a live record, in whatever role.

    Raises:
        ConfigurationError, StoreUnavailableError: as `Store.connect`.
    """
    expected = {settings.id_for(role) for role in Role}
    store = await Store.connect(settings)
    try:
        return any(record.worker_id in expected for record in await store.registry.workers())
    finally:
        await store.close()


def main() -> None:
    """Exit with 0 where the worker is alive, else with 1 and the reason on standard error."""
    try:
        alive = asyncio.run(is_alive(WorkerSettings.load()))
    except (ConfigurationError, StoreUnavailableError) as error:
        sys.exit(f"unhealthy: {error}")
    if not alive:
        sys.exit("unhealthy: no live heartbeat of this container's worker in Redis")


if __name__ == "__main__":
    main()
