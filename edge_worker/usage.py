"""Counts of one answer: what `usage` reports and telemetry shows."""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec.structs import replace

from bus.protocol.messages import Ack, DraftWindow, FinishReason, Message, Outcome
from bus.store import SessionEntry, TimelineEntry, Usage, WindowEntry, WorkerRecord
from decoding.edge import SessionSpec
from decoding.edge_events import WindowJudged
from edge_worker.peers import Peer
from edge_worker.stage_meter import StageMeter
from edge_worker.timeline import Timeline
from engines.thread import now_ms

OWN_PASSES = 16
"""Passes of the target by itself that one entry of telemetry adds up."""


class FirstPass:
    """What the first target pass of a session gave, and how long ago that was.

    It takes in all that was drafted while the prompt ran, a window or many, so speeds of decoding
    are of what comes after.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._end_ms: float | None = None
        self._last_ms = 0.0

    def judged(self, effect: WindowJudged) -> None:
        """What a feedback says of one window; the first pass is that of the first feedback."""
        if self._end_ms is None:
            self._end_ms = effect.at_ms
        if effect.at_ms == self._end_ms:
            self.num_tokens += effect.num_committed
        self._last_ms = effect.at_ms

    @property
    def seconds_since(self) -> float:
        """From its first feedback to the last."""
        return 0.0 if self._end_ms is None else (self._last_ms - self._end_ms) / 1e3


def within(effect: WindowJudged, num_kept: int) -> WindowJudged:
    """Facts of a window restricted to the tokens that became part of the answer: a stop string may
    end it in the middle of what a feedback commits, and tokens after it are not counted.

    Args:
        num_kept: tokens that stay, of those that are committed because of the window.
    """
    lost = effect.num_committed - min(num_kept, effect.num_committed)
    after = effect.num_committed - effect.num_accepted  # the target's own, lost first
    return replace(
        effect,
        num_committed=effect.num_committed - lost,
        num_accepted=effect.num_accepted - max(0, lost - max(0, after)),
    )


class UsageMeter:
    """Adds up one answer. After a takeover it counts from the takeover on, except for tokens.

    Attributes:
        stage: what the stage before the target did.

    Args:
        num_committed: tokens of the answer that an earlier owner of the prompt has stored.
        probes: probe digests of the targets that gave those (`Claim.streamed_probes`).
    """

    def __init__(
        self, request: str, spec: SessionSpec, num_committed: int, probes: Sequence[str] = ()
    ) -> None:
        self._request = request
        self._spec = spec
        self._began_s = time.monotonic()
        self._num_before = num_committed
        self._completion_tokens = num_committed
        self._drafted_tokens = 0
        self._accepted_tokens = 0
        self._windows = 0
        self._rollbacks = 0
        self._passes = 0
        self._own_passes = 0
        self._prehit_rejections = 0
        self._proposed = 0
        self._rescues = 0
        self._steps = 0
        self._accepted_steps = 0
        self._first_pass = FirstPass()
        self._written_tokens = 0
        self.timeline = Timeline(now_ms())
        self.stage = StageMeter(self.timeline.began_ms)
        self._drafting_bytes = 0  # of windows and acknowledgements
        self._sent_tokens = 0
        self._cloud = ""
        self._probes = set(probes) if num_committed else set()
        self.probe = probes[-1] if probes else ""
        self._dtype = ""
        self._bitwise = True
        self._bytes_told = (0, 0)
        self._own_committed = self._own_waiting = 0  # of passes without an entry yet
        self._own: WindowJudged | None = None
        self.rtt_ms = 0.0  # as sessions inside this one measured it last
        self.bytes_up = 0
        self.bytes_down = 0

    def committed(self, num_tokens: int, target: WorkerRecord | None = None) -> None:
        """Tokens of the answer, and the cloud worker that gave them."""
        self._completion_tokens += num_tokens
        if target is not None and num_tokens:
            self.probe, self._dtype = target.probe_digest, target.dtype
            self._probes.add(target.probe_digest)
            self._bitwise = self._bitwise and target.bitwise

    def drafted(self, start: int, num_tokens: int, draft_ms: float, ended_ms: float) -> None:
        """A draft job has ended, by itself or interrupted."""
        self._written_tokens += num_tokens
        self.timeline.drafted(start, num_tokens, draft_ms, ended_ms)

    def sent(self, message: Message, size: int) -> None:
        """One frame of `size` bytes, resent ones included."""
        self.bytes_up += size
        if isinstance(message, DraftWindow | Ack):
            self._drafting_bytes += size
        if isinstance(message, DraftWindow):
            self._sent_tokens += message.num_tokens
            self.timeline.sent(message, now_ms())

    def judged(self, effect: WindowJudged) -> None:
        """Count what a feedback says of a window, or of a pass without one."""
        self.timeline.judged(effect)
        self._first_pass.judged(effect)
        self._passes += effect.pass_tokens > 0
        self._own_passes += effect.pass_tokens > 0 and not effect.num_drafted
        self._prehit_rejections += effect.outcome is Outcome.PREHIT_REJECTED
        self._rescues += effect.rescued
        self._proposed += effect.proposed
        self._windows += effect.num_drafted > 0
        self._drafted_tokens += effect.num_drafted
        self._accepted_tokens += effect.num_accepted
        self._rollbacks += effect.rolled_back

    def passed(self, effect: WindowJudged) -> None:
        """Count the pass of a session inside this one; what it verified is no part of the answer
        yet."""
        self.timeline.passed(effect)
        self._passes += effect.pass_tokens > 0
        self._own_passes += effect.pass_tokens > 0 and not effect.num_drafted
        self.rtt_ms = effect.rtt_ms

    def stepped(self, accepted: bool) -> None:
        """A step of the answer is decided."""
        self._steps += 1
        self._accepted_steps += accepted

    def entry(self, effect: WindowJudged, peer: Peer | None) -> WindowEntry | None:
        """The telemetry entry of one judged window; its bytes are those since the last entry.

        Passes without a window have one entry for `OWN_PASSES` of them, or are counted with the
        next window: None where they wait for that.
        """
        effect = replace(effect, num_committed=self._own_committed + effect.num_committed)
        self._own_committed, self._own_waiting = effect.num_committed, self._own_waiting + 1
        self._own = effect
        if not effect.num_drafted and self._own_waiting < OWN_PASSES:
            return None
        return self._entry(effect, peer)

    def rest(self, peer: Peer | None) -> list[WindowEntry]:
        """The entry of passes that still wait for one, if any do."""
        return [self._entry(self._own, peer)] if self._own is not None else []

    def _entry(self, effect: WindowJudged, peer: Peer | None) -> WindowEntry:
        self._own_committed, self._own_waiting, self._own = 0, 0, None
        bytes_up = self.bytes_up - self._bytes_told[0]
        bytes_down = self.bytes_down - self._bytes_told[1]
        self._bytes_told = (self.bytes_up, self.bytes_down)
        self._cloud = peer.record.worker_id if peer is not None else ""
        return WindowEntry(
            at_ms=time.time_ns() // 1_000_000,
            request=self._request,
            session=self._spec.session,
            client=self._spec.client,
            edge=self._spec.edge,
            cloud=self._cloud,
            method=self._spec.method.name,
            incarnation=effect.incarnation,
            number=effect.number,
            outcome=effect.outcome.value,
            num_drafted=effect.num_drafted,
            num_accepted=effect.num_accepted,
            num_committed=effect.num_committed,
            rollback=effect.rolled_back,
            threshold=effect.threshold,
            window=effect.window,
            credit=effect.credit,
            draft_ms=effect.draft_ms,
            verify_ms=effect.verify_ms,
            queue_ms=effect.queue_ms,
            rtt_ms=effect.rtt_ms,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            budget=effect.budget,
            in_flight=effect.in_flight,
            proposed=effect.proposed,
        )

    def usage(self) -> Usage:
        """The answer's `usage` so far."""
        seconds = time.monotonic() - self._began_s
        new_tokens = self._completion_tokens - self._num_before
        shares, steps = self.timeline.shares(), self._spec.method.steps
        return Usage(
            prompt_tokens=len(self._spec.prompt),
            completion_tokens=self._completion_tokens,
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
            windows=self._windows,
            rollbacks=self._rollbacks,
            acceptance=self._accepted_tokens / max(self._drafted_tokens, 1),
            seconds=seconds,
            tokens_per_s=new_tokens / seconds if seconds > 0 else 0.0,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            bytes_per_drafted_token=(
                self._drafting_bytes / self._sent_tokens if self._sent_tokens else 0.0
            ),
            lossless=self._spec.method.lossless,
            wasted_tokens=max(0, self._written_tokens - self._accepted_tokens),
            passes=self._passes,
            own_passes=self._own_passes,
            passes_saved=max(0, self._windows - (self._passes - self._own_passes)),
            prehit_rejections=self._prehit_rejections,
            rescues=self._rescues,
            proposed=self._proposed,
            steps=self._steps,
            accepted_steps=self._accepted_steps,
            judge="" if steps is None else steps.judge.name,
            edge_idle=shares.edge_idle,
            cloud_idle=shares.cloud_idle,
            hidden=shares.hidden,
            decode_tokens=max(0, new_tokens - self._first_pass.num_tokens),
            decode_seconds=self._first_pass.seconds_since,
            dtype=self._dtype,
            bitwise=self._bitwise and self._probes == {self.probe} and self.probe != "",
            probe_digest=self.probe,
            middle_tokens=self.stage.num_tokens,
            middle_drafted_tokens=self.stage.num_drafted,
            middle_accepted_tokens=self.stage.num_accepted,
            middle_passes=self.stage.passes,
            middle_own_passes=self.stage.own_passes,
            middle_restarts=self.stage.restarts,
            middle_seconds=self.stage.busy_ms / 1e3,
            middle_bytes=self.stage.num_bytes,
        )

    def closing(self, reason: FinishReason) -> SessionEntry:
        """The telemetry entry of the finished session."""
        return SessionEntry(
            at_ms=time.time_ns() // 1_000_000,
            request=self._request,
            session=self._spec.session,
            client=self._spec.client,
            edge=self._spec.edge,
            cloud=self._cloud,
            method=self._spec.method.name,
            finish_reason=reason.value,
            usage=self.usage(),
        )

    def timeline_entry(self) -> TimelineEntry:
        """The telemetry entry with the finished session's timeline."""
        return TimelineEntry(
            at_ms=time.time_ns() // 1_000_000,
            request=self._request,
            session=self._spec.session,
            client=self._spec.client,
            edge=self._spec.edge,
            cloud=self._cloud,
            method=self._spec.method.name,
            events=(*self.timeline.events(), *self.stage.events()),
        )
