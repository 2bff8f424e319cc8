"""Who is in charge: of several controllers one acts, the others wait to take over.

A controller begins when it holds the lease in Redis and renews it three times as often as it runs
out. One that has lost it ends with an error, and whoever started it starts it again, to wait. While
Redis is away nobody can take over, so the holder goes on; should it have been cut off alone, its
term is lower than its successor's, and edges ignore what it still says.
"""

from __future__ import annotations

import asyncio
import logging

from bus.protocol.errors import LocalError, StoreUnavailableError
from bus.store import Store

log = logging.getLogger(__name__)

RETRY_S = 0.5


class LeaseLostError(LocalError):
    """Another controller is in charge."""


class Lease:
    """The lease of one controller process.

    Args:
        holder: unique among processes.
        ttl_s: without renewal another may take it after this long.
    """

    def __init__(self, store: Store, holder: str, ttl_s: float) -> None:
        self._sessions = store.sessions
        self._holder = holder
        self._ttl_s = ttl_s

    async def acquire(self) -> None:
        """Return once it is ours."""
        said = False
        while not await self._try():
            if not said:
                log.info("another controller is in charge; waiting to take over")
            said = True
            await asyncio.sleep(RETRY_S)

    async def _try(self) -> bool:
        try:
            return await self._sessions.hold_lease(self._holder, self._ttl_s)
        except StoreUnavailableError as error:
            log.warning("%s; waiting for it", error)
            return False

    async def keep_forever(self) -> None:
        """Renew it.

        Raises:
            LeaseLostError: another controller has taken over.
        """
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            try:
                held = await self._sessions.hold_lease(self._holder, self._ttl_s)
            except StoreUnavailableError:
                continue
            if not held:
                raise LeaseLostError("another controller has taken over; this one ends")

    async def release(self) -> None:
        """Let the next one begin at once, if Redis is there to be told."""
        try:
            await self._sessions.release_lease(self._holder)
        except StoreUnavailableError as error:
            log.warning("the lease runs out by itself: %s", error)
