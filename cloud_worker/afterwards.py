"""What may wait until edges have their feedback: reports to the controller."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)

DELAY_S = 0.005
"""Feedback has left by then, and the next pass, if there is one, computes [ours]."""


class Afterwards:
    """Calls that are put off for `DELAY_S`: made at once they would share a core with the sending
    of the feedback and with the beginning of the next pass. They keep their order, and nothing
    depends on the delay."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, call: Callable[[], None]) -> None:
        """Make this call later, after those that wait; what it raises is logged."""
        self._calls.append(call)
        if self._timer is None:
            self._timer = self._loop.call_later(DELAY_S, self.run)

    def run(self) -> None:
        """Make them now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        calls, self._calls = self._calls, []
        for call in calls:
            try:
                call()
            except Exception:
                log.exception("a report to the controller failed")
