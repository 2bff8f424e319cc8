"""What the stage before the target has done for one answer (`edge_worker.stages`)."""

from __future__ import annotations

from collections import deque

from bus.store import StageSpan
from decoding.edge_events import WindowJudged
from edge_worker.peers import Peer
from edge_worker.timeline import MAX_EVENTS


class StageMeter:
    """Adds up the feedback of a middle worker.

    Attributes:
        began_ms: beginning of the answer, on the shell's clock.
        num_tokens: that it has written, those of its drafts that it accepted included; what the
            target thought of them shows in the session's own counts.
        num_drafted, num_accepted: tokens drafted for it, and those of them that it accepted.
        passes: of its model; own_passes: those without a draft. busy_ms: what they took.
        restarts: times it began again because the target's text had turned away or was ahead.
        num_bytes: of all messages between edge and middle worker.
    """

    def __init__(self, began_ms: float) -> None:
        self.began_ms = began_ms
        self.num_tokens = self.num_drafted = self.num_accepted = 0
        self.passes = self.own_passes = self.restarts = self.num_bytes = 0
        self.busy_ms = 0.0
        self._spans: deque[StageSpan] = deque(maxlen=MAX_EVENTS)

    def judged(self, effect: WindowJudged, peer: Peer | None) -> None:
        """Count what a feedback says of a window, or of a pass without one."""
        self.num_tokens += effect.num_committed
        self.num_drafted += effect.num_drafted
        self.num_accepted += effect.num_accepted
        if not effect.pass_tokens:
            return
        self.passes += 1
        self.own_passes += not effect.num_drafted
        self.busy_ms += effect.verify_ms
        end_ms = effect.at_ms - self.began_ms - effect.rtt_ms / 2
        worker = "" if peer is None else peer.record.worker_id
        self._spans.append(
            StageSpan(
                max(0.0, end_ms - effect.verify_ms), max(0.0, end_ms), effect.pass_tokens,
                effect.num_accepted, worker,
            )
        )  # fmt: skip

    def events(self) -> tuple[StageSpan, ...]:
        """The latest passes, for a timeline."""
        return tuple(self._spans)
