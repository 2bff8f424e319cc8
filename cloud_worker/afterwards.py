"""What may wait until edges have their feedback: reports to the controller."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)

LATEST_S = 0.02
"""Longest wait where no pass begins meanwhile [ours]."""


class Afterwards:
    """Calls that are put off until the model runs a pass, when the event loop has nothing else to
    do: made at once they would share a core with the sending of the feedback."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: list[Callable[[], None]] = []
        self._latest: asyncio.TimerHandle | None = None

    def add(self, call: Callable[[], None]) -> None:
        """Make this call later, after those that wait; what it raises is logged."""
        self._calls.append(call)
        if self._latest is None:
            self._latest = self._loop.call_later(LATEST_S, self.run)

    def pass_begins(self) -> None:
        """A pass has been given to the model."""
        if self._calls:
            self._loop.call_soon(self.run)

    def run(self) -> None:
        """Make them now."""
        if self._latest is not None:
            self._latest.cancel()
            self._latest = None
        calls, self._calls = self._calls, []
        for call in calls:
            try:
                call()
            except Exception:
                log.exception("a report to the controller failed")
