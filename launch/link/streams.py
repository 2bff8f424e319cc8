"""One direction of a relayed connection: what is under way, and letting it out on time.

Three things keep the delays true:

- A delay counts from when the kernel received the bytes, not from when this process got around
  to reading them.
- The event loop waits in select(), whose timeouts are microseconds. asyncio's usual epoll rounds
  up to whole milliseconds, and so does uvloop.
- It wakes `SPIN_NS` early and spins the rest, since who has slept gets going late.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from launch.link.accuracy import Lateness
from launch.link.ends import End
from launch.link.schedule import Flow, Lane

__all__ = ["Direction", "Stream", "new_event_loop"]

SPIN_NS = 300_000
"""Chosen by measurement, see docs/link.md."""
MAX_HELD_BYTES = 4 * 2**20
"""Of one stream; beyond it the sender has to wait, as with a full TCP window."""


def new_event_loop() -> asyncio.SelectorEventLoop:
    """The loop that streams have to run on."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class Direction:
    """One direction of the link, shared by all connections: its schedule, and what came through."""

    def __init__(self, lane: Lane, lateness: Lateness) -> None:
        self.lane = lane
        self.lateness = lateness
        self.origin_ns = 0
        """Time 0 of the schedule by the monotonic clock."""
        self.num_bytes = 0


class Stream:
    """One direction of one connection.

    Args:
        on_end: called when the source's end has come out at the sink; told whether the source
            was reset.
    """

    def __init__(self, direction: Direction, on_end: Callable[[bool], None]) -> None:
        self.sink: End | None = None
        """Where bytes come out; set before the first does."""
        self._direction = direction
        self._on_end = on_end
        self._source: End | None = None
        self._flow = Flow()
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._num_waiting = 0
        self._since_ns = 0
        self._paused = False
        self._closed = False
        self._releasing = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def read_from(self, source: End) -> None:
        """Begin to take what the source sends."""
        self._source = source
        self._since_ns = time.monotonic_ns()
        source.resume(self._take)

    def signal(self, arrive: Callable[[], None]) -> None:
        """Have `arrive` called when a packet without payload that leaves now has come out."""
        self._put(time.monotonic_ns(), 0, lambda _start, _stop: arrive())

    def make_room(self) -> None:
        """Go on reading if the sink has taken enough."""
        if self._paused and self._source is not None and self._num_held < MAX_HELD_BYTES:
            self._paused = False
            self._source.resume(self._take)

    def close(self) -> None:
        self._closed = True
        self._paused = False
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()

    @property
    def _num_held(self) -> int:
        return self._num_waiting + (0 if self.sink is None else self.sink.num_unsent)

    def _take(self) -> None:
        source = self._source
        assert source is not None
        got = source.read()
        if got is None:
            return
        data, arrived_ns = got
        if not data:
            source.pause()
            self.signal(partial(self._on_end, source.broken))
            return
        # What a client sends at once waits in the kernel until the handshake is over.
        left_ns = max(arrived_ns, self._since_ns)
        self._put(left_ns, len(data), partial(self._deliver, data))
        if self._num_held >= MAX_HELD_BYTES:
            self._paused = True
            source.pause()

    def _deliver(self, data: bytes, start: int, stop: int) -> None:
        assert self.sink is not None
        self.sink.write(data[start:stop])
        self._direction.num_bytes += stop - start
        self._num_waiting -= stop - start
        self.make_room()

    def _put(self, arrived_ns: int, num_bytes: int, deliver: Callable[[int, int], None]) -> None:
        """Have `deliver` called with the bounds of each part as it comes out."""
        if self._closed:
            return
        origin_ns = self._direction.origin_ns
        self._num_waiting += num_bytes
        start = 0
        for packet in self._direction.lane.send(self._flow, arrived_ns - origin_ns, num_bytes):
            stop = start + packet.num_bytes
            out = partial(deliver, start, stop)
            self._waiting.append((packet.release_ns + origin_ns, out))
            start = stop
        if self._timer is None and not self._releasing:
            self._release_due()

    def _release_due(self) -> None:
        self._timer = None
        self._releasing = True
        try:
            self._release()
        finally:
            self._releasing = False

    def _release(self) -> None:
        while self._waiting:
            release_ns, out = self._waiting[0]
            if release_ns - time.monotonic_ns() > SPIN_NS:
                self._timer = self._loop.call_at((release_ns - SPIN_NS) / 1e9, self._release_due)
                return
            self._waiting.popleft()
            while time.monotonic_ns() < release_ns:
                pass
            out()
            self._direction.lateness.add(time.monotonic_ns() - release_ns)
