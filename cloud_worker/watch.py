"""What a cloud worker's passes and sessions add to metrics, logs and traces.

Passes are counted on the model thread, everything else on the event loop.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sized
from contextlib import AbstractContextManager

from bus.protocol.messages import OpenSession, Outcome, WindowReport
from bus.runtime.logs import log_context
from bus.runtime.metrics import COUNTS, Metrics, register_shared
from bus.runtime.tracing import Tracing
from bus.transport.sockets import Sockets
from engines.energy import PowerGauge
from engines.metrics import register_energy, register_prefixes
from engines.torch.prefixes import PrefixCache

log = logging.getLogger(__name__)


class CloudTally:
    """Totals of one cloud worker since its start."""

    def __init__(self, metrics: Metrics) -> None:
        self.faults: Counter[str] = Counter()
        self.own_tokens = 0
        self._verify_s = metrics.histogram(
            "verify_time_seconds", "Duration of a pass of the target, in seconds."
        )
        self._rows = metrics.histogram(
            "pass_tokens", "Tokens in a pass, of prompts, windows and trees.", COUNTS
        )
        self._sessions = metrics.histogram("pass_sessions", "Sessions that share a pass.", COUNTS)
        metrics.counter("faults", "Faults sent to edges, by code.", lambda: self.faults, "code")
        metrics.counter("own_tokens", "Tokens that the target has written by itself.",
                        lambda: self.own_tokens)  # fmt: skip

    def passed(self, num_sessions: int, num_rows: int, ms: float) -> None:
        """A pass has run; on the model thread."""
        self._verify_s.observe(ms / 1e3)
        self._rows.observe(num_rows)
        self._sessions.observe(num_sessions)

    def reported(self, report: WindowReport) -> None:
        """What became of a window, or of passes without one."""
        if report.outcome is Outcome.OWN:
            self.own_tokens += report.num_own

    def register(
        self,
        metrics: Metrics,
        sessions: Sized,
        waiting: Sized,
        sockets: Sockets,
        prefixes: PrefixCache,
        gauge: PowerGauge,
    ) -> None:
        """What a cloud worker counts anyway.

        Args:
            sessions: those that are open. waiting: those that were refused for want of a place.
        """
        metrics.gauge("num_requests_running", "Sessions that are open.", lambda: len(sessions))
        metrics.gauge("num_requests_waiting", "Sessions that wait for a place.",
                      lambda: len(waiting))  # fmt: skip
        register_shared(metrics, sockets.counters, sockets.traffic)
        register_prefixes(metrics, prefixes)
        register_energy(metrics, gauge)


class SessionWatch:
    """One session, from its opening to its end here."""

    def __init__(self, tracing: Tracing, message: OpenSession) -> None:
        self._session, self._traceparent = message.session, message.traceparent
        attributes: Mapping[str, str | int] = {
            "session": message.session, "edge": message.edge, "method": message.method,
            "incarnation": message.incarnation,
        }  # fmt: skip
        self._span = tracing.span("session", message.traceparent, attributes)
        with self.context():
            log.info("session %s opens: %s of %s", message.session, message.method, message.edge)

    def context(self) -> AbstractContextManager[None]:
        """Records within are about this session."""
        return log_context(self._traceparent, session=self._session)

    def reported(self, report: WindowReport) -> None:
        """A window, or passes without one."""
        if self._span.recorded:
            self._span.event("pass", {
                "outcome": str(report.outcome), "drafted": report.num_drafted,
                "accepted": report.num_accepted, "own": report.num_own,
                "verify_ms": report.verify_ms, "queue_ms": report.queue_ms,
            })  # fmt: skip

    def closed(self, reason: str) -> None:
        """The session has ended here."""
        self._span.end({"reason": reason})
        with self.context():
            log.info("session %s closes: %s", self._session, reason)
