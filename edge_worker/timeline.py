"""When one session drafted, what it had in flight and when it rolled back.

Recorded while the session runs, for the shares that `usage` reports and, where the worker's
setting `timeline` is on, for a plot. Times are ms on the session's own clock, 0 at its beginning.
Only the latest `MAX_EVENTS` of each kind are kept; the shares are of what is kept.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bus.protocol.messages import DraftWindow
from bus.store import DraftSpan, PassSpan, Rollback, TimelineEvent, WindowSpan
from decoding.edge_events import WindowJudged

MAX_EVENTS = 10_000


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the time from the first draft to the last feedback, each in 0 … 1.

    Attributes:
        edge_idle: in which the draft did not draft for this session.
        cloud_idle: in which the target ran no pass for this session.
        hidden: of the time with windows in flight, the part in which the draft went on.
    """

    edge_idle: float = 0.0
    cloud_idle: float = 0.0
    hidden: float = 0.0


def _ring() -> deque[Any]:
    return deque(maxlen=MAX_EVENTS)


@dataclass(slots=True)
class Timeline:
    """One session's. `began_ms` is its beginning on the shell's clock."""

    began_ms: float
    _drafts: deque[DraftSpan] = field(default_factory=_ring)
    _windows: deque[WindowSpan] = field(default_factory=_ring)
    _open: dict[int, WindowSpan] = field(default_factory=dict)
    _own: deque[PassSpan] = field(default_factory=_ring)
    _rollbacks: deque[Rollback] = field(default_factory=_ring)
    _passes_ms: float = 0.0
    _passed_ms: float = 0.0  # until when inner passes have been counted

    def drafted(self, start: int, num_tokens: int, draft_ms: float, now_ms: float) -> None:
        """A draft job has ended just now, by itself or interrupted."""
        end_ms = now_ms - self.began_ms
        self._drafts.append(DraftSpan(end_ms - draft_ms, end_ms, start, num_tokens))

    def sent(self, message: DraftWindow, now_ms: float) -> None:
        """A window leaves; one that is sent again is in flight since the first time."""
        if message.number not in self._open:
            self.opened(message.number, message.start, message.num_tokens, now_ms)

    def opened(self, number: int, start: int, num_tokens: int, now_ms: float) -> None:
        """Something drafted waits for its feedback from now on: a window, or a whole step."""
        self._open[number] = WindowSpan(now_ms - self.began_ms, number, start, num_tokens)

    def passed(self, effect: WindowJudged) -> None:
        """A pass of a session inside this one. Several of them share passes, whose time counts
        once."""
        if not effect.pass_tokens:
            return
        end_ms = max(effect.verify_ms, effect.at_ms - self.began_ms - effect.rtt_ms / 2)
        begin_ms = end_ms - effect.verify_ms
        self._own.append(PassSpan(begin_ms, end_ms, effect.pass_tokens))
        self._passes_ms += max(0.0, end_ms - max(begin_ms, self._passed_ms))
        self._passed_ms = max(self._passed_ms, end_ms)

    def judged(self, effect: WindowJudged) -> None:
        """What feedback says of a window, or of a pass without one; windows that are in flight at a
        rejection are dropped."""
        at_ms = effect.at_ms - self.began_ms
        span = self._open.get(effect.number)
        if span is not None and effect.num_drafted:
            self._open[effect.number] = msgspec.structs.replace(
                span, num_accepted=effect.num_accepted, verify_ms=effect.verify_ms,
                queue_ms=effect.queue_ms, pass_tokens=effect.pass_tokens, rtt_ms=effect.rtt_ms,
            )  # fmt: skip
            self._end(effect.number, at_ms, effect.outcome.value)
        elif effect.pass_tokens:
            end_ms = max(effect.verify_ms, at_ms - effect.rtt_ms / 2)
            depth = effect.num_drafted if effect.proposed else 0
            accepted = effect.num_accepted if effect.proposed else 0
            self._own.append(
                PassSpan(
                    end_ms - effect.verify_ms, end_ms, effect.pass_tokens, effect.proposed, depth,
                    accepted,
                )
            )  # fmt: skip
        self._passes_ms += effect.verify_ms if effect.pass_tokens else 0.0
        if effect.rolled_back:
            for number in list(self._open):
                self._end(number, at_ms, "dropped")
            self._rollbacks.append(Rollback(at_ms, effect.length))

    def _end(self, number: int, at_ms: float, outcome: str) -> None:
        span = self._open.pop(number)
        self._windows.append(msgspec.structs.replace(span, end_ms=at_ms, outcome=outcome))

    def events(self) -> tuple[TimelineEvent, ...]:
        """Everything kept, by its beginning."""
        kept: list[TimelineEvent] = [*self._drafts, *self._windows, *self._own, *self._rollbacks]
        return tuple(sorted(kept, key=lambda event: event.at_ms))

    def shares(self) -> Shares:
        """Of the time seen so far."""
        if not self._windows and not self._own:
            return Shares()
        firsts = [each[0] for each in (self._drafts, self._windows, self._own) if each]
        lasts = [each[-1] for each in (self._windows, self._own) if each]
        begin_ms = min(span.at_ms for span in firsts)
        end_ms = max(span.end_ms for span in lasts)
        drafting = _union([(d.at_ms, d.end_ms) for d in self._drafts])
        flying = _union([(w.at_ms, w.end_ms) for w in self._windows])
        whole_ms, flying_ms = max(end_ms - begin_ms, 1e-9), max(_length(flying), 1e-9)
        return Shares(
            edge_idle=_share(1.0 - _length(_clip(drafting, end_ms)) / whole_ms),
            cloud_idle=_share(1.0 - self._passes_ms / whole_ms),
            hidden=_share(_overlap(drafting, flying) / flying_ms),
        )


Spans = list[tuple[float, float]]


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


def _clip(spans: Spans, end_ms: float) -> Spans:
    return [(begin, min(end, end_ms)) for begin, end in spans if begin < end_ms]


def _union(spans: Spans) -> Spans:
    """The same time as spans that do not touch, in order."""
    joined: Spans = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def _overlap(a: Spans, b: Spans) -> float:
    """Time in both; each is a union."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total
