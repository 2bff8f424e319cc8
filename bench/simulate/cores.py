"""A virtual clock, and two models that each do one thing at a time and slow each other down."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Clock:
    """Events in the order of their times; equal times in the order they were set."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, delay_ms: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now_ms + delay_ms, next(self._order), action))

    def advance(self) -> None:
        """To the next event."""
        self.now_ms, _, action = heapq.heappop(self._due)
        action()


class Core:
    """One model's core. Work is given in ms alone; while the other core works it takes
    `slowdown` times as long, from the moment on at which the other begins."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._slowdown = 1.0
        self._other: Core | None = None
        self._left_ms = 0.0
        self._seen_ms = 0.0
        self._done: Callable[[], None] | None = None
        self._version = 0

    def beside(self, other: Core) -> None:
        """Share a machine with `other`."""
        self._other, other._other = other, self

    @property
    def busy(self) -> bool:
        return self._done is not None

    def work(self, alone_ms: float, slowdown: float, done: Callable[[], None]) -> None:
        """Begin; `done` is called at the end. Only while not busy."""
        assert not self.busy
        self._slowdown = slowdown
        if self._other is not None:
            self._other._progress()
        self._left_ms, self._seen_ms, self._done = alone_ms, self._clock.now_ms, done
        self._set_timers()

    def interrupt(self, ms: float) -> None:
        """Other work comes first: what is being done, if anything, takes so much longer."""
        if self.busy:
            self._progress()
            if self._other is not None:
                self._other._progress()
            self._left_ms += ms / self._factor
            self._set_timers()

    def _set_timers(self) -> None:
        for core in (self, self._other):
            if core is not None and core.busy:
                core._version += 1
                version = core._version
                self._clock.after(core._left_ms * core._factor, _if_current(core, version))

    @property
    def _factor(self) -> float:
        return self._slowdown if self._other is not None and self._other.busy else 1.0

    def _progress(self) -> None:
        """Account for the time since the last change, at the rate that held in it."""
        if self.busy:
            self._left_ms -= (self._clock.now_ms - self._seen_ms) / self._factor
        self._seen_ms = self._clock.now_ms

    def _finish(self) -> None:
        done = self._done
        assert done is not None
        if self._other is not None:
            self._other._progress()
        self._done = None
        self._set_timers()
        done()


def _if_current(core: Core, version: int) -> Callable[[], None]:
    def finish() -> None:
        if core._version == version and core.busy:
            core._finish()

    return finish
