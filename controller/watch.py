"""What the controller counts, as metrics."""

from __future__ import annotations

import asyncio

from bus.protocol.errors import StoreUnavailableError
from bus.runtime.metrics import Metrics, register_shared
from bus.store import QueueDepth, Store
from bus.transport.sockets import Sockets

QUEUE_EVERY_S = 1.0


class ControllerTally:
    """Totals of one controller since its start, and what the queue holds.

    Attributes:
        term: of its lease; 0 while another controller is in charge.
        queue: as it was last looked at; None before, and while Redis does not answer.
    """

    def __init__(self, metrics: Metrics, sockets: Sockets) -> None:
        self.term = 0
        self.updates = self.reports = self.records = 0
        self.queue: QueueDepth | None = None
        self._register(metrics)
        register_shared(metrics, sockets.counters, sockets.traffic)

    def _register(self, metrics: Metrics) -> None:
        metrics.gauge("controller_leader", "1 where this controller is in charge, 0 where it waits "
                      "to take over.", lambda: int(self.term > 0))  # fmt: skip
        metrics.gauge("controller_term", "Term of the controller; it rises with each takeover.",
                      lambda: self.term or None)  # fmt: skip
        metrics.counter("control_updates", "Updates published to edges, repeats included.",
                        lambda: self.updates)  # fmt: skip
        metrics.counter("window_reports", "Reports of windows that have come.",
                        lambda: self.reports)  # fmt: skip
        metrics.counter("records_stored", "Session records, histories, reports written to Redis.",
                        lambda: self.records)  # fmt: skip
        metrics.gauge("num_requests_waiting", "Requests in the queue that no edge has taken.",
                      self._waiting)  # fmt: skip
        metrics.gauge("queue_oldest_age_seconds", "Age of the oldest request that has not ended, "
                      "in seconds.", self._oldest_age_s)  # fmt: skip

    def _waiting(self) -> float | None:
        return None if self.queue is None else self.queue.length - self.queue.pending

    def _oldest_age_s(self) -> float | None:
        return None if self.queue is None else self.queue.oldest_age_s

    async def watch_queue(self, store: Store) -> None:
        """Look at the queue every second."""
        while True:
            try:
                self.queue = await store.queue.depth()
            except StoreUnavailableError:
                self.queue = None
            await asyncio.sleep(QUEUE_EVERY_S)
