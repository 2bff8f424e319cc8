"""Taking over what a person wishes while the controller runs (`bus.store.tuning`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import msgspec

from bus.protocol.errors import ConfigurationError, StoreUnavailableError
from bus.store import InUse, Store, Tuning, decode_wish
from controller.policies import Policies
from controller.settings import ControllerSettings

log = logging.getLogger(__name__)

LOOK_S = 1.0


def tuning_of(settings: ControllerSettings) -> Tuning:
    """The part of the settings that may change."""
    return Tuning(**{name: getattr(settings, name) for name in Tuning.__struct_fields__})


def tuned(settings: ControllerSettings, tuning: Tuning) -> ControllerSettings:
    """The settings with that part replaced, checked as at a start.

    Raises:
        ConfigurationError: numbers are out of bounds or out of order.
    """
    values = settings.model_dump() | msgspec.structs.asdict(tuning)
    return ControllerSettings.load(**values)


class Tuner:
    """Follows the wish.

    Args:
        settings: what the controller was started with; without a wish they hold.
        policies: retuned where the wish changes.
    """

    def __init__(self, settings: ControllerSettings, store: Store, policies: Policies) -> None:
        self._settings = settings
        self._store = store
        self._policies = policies
        own = tuning_of(settings)
        self._in_use = InUse(own, own, time.time())
        self._seen = b""

    async def follow_forever(self) -> None:
        """Look every second; say what is in use, also to a Redis that came back empty."""
        while True:
            with contextlib.suppress(StoreUnavailableError):
                await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Take the wish over if it is another one now. Raises StoreUnavailableError."""
        wish = await self._store.tunings.wish()
        if wish != self._seen:
            self._seen = wish
            self._take(wish)
        await self._store.tunings.say(self._in_use)

    def _take(self, stored: bytes) -> None:
        try:
            wanted = decode_wish(stored).tuning if stored else self._in_use.own
            settings = tuned(self._settings, wanted)
        except (msgspec.DecodeError, ConfigurationError) as error:
            log.warning("a wish for other settings is not taken over: %s", error)
            self._in_use = msgspec.structs.replace(self._in_use, problem=str(error))
            return
        log.info("using %s", wanted)
        self._policies.retune(settings)
        self._in_use = InUse(wanted, self._in_use.own, time.time())
