"""What a pair of devices takes, in milliseconds; and how to read it off measured sessions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from bus.protocol.errors import ConfigurationError
from bus.store import DraftSpan, PassSpan, TimelineEntry, WindowSpan
from decoding import methods
from engines.padding import LeastTimes

_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_Millis = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Factor = Annotated[float, msgspec.Meta(ge=1, le=1e3)]


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Draft and target, and what surrounds them.

    Attributes:
        step_ms: c, a draft step while the target does nothing.
        pass_ms, pass_token_ms: t(n) = pass_ms + pass_token_ms·(n − 1), while the draft is idle.
        passes: t(n) as measured at some n, linear between and beyond; instead of the two, if given.
        step_slowdown, pass_slowdown: factors of step_ms and pass_ms while the other model runs; 1
            on two machines. They share the memory that weights are read from; arithmetic, which
            pass_token_ms is, each does on its own core.
        start_ms: from feedback, or from a draft's end, to the beginning of the next draft.
        message_ms: what a window and its feedback take besides link, pass and queue, together.
        window_ms: what a window that arrives costs the pass under way, on the same core.
        feedback_ms: what feedback that arrives costs the draft under way.
        step_prompt_ms, pass_prompt_ms: what each model takes to read the prompt. Meanwhile the
            draft goes on, and all that it has written goes through the first pass.
    """

    step_ms: _Positive
    pass_ms: _Positive
    pass_token_ms: _Millis = 0.0
    step_slowdown: _Factor = 1.0
    pass_slowdown: _Factor = 1.0
    start_ms: _Millis = 0.0
    message_ms: _Millis = 0.0
    window_ms: _Millis = 0.0
    feedback_ms: _Millis = 0.0
    step_prompt_ms: _Millis = 0.0
    pass_prompt_ms: _Millis = 0.0
    passes: tuple[tuple[int, float], ...] = ()

    def target_ms(self, num_tokens: int) -> float:
        """t(n), alone."""
        if self.passes:
            return LeastTimes(self.passes).of(num_tokens)
        return self.pass_ms + self.pass_token_ms * (num_tokens - 1)

    def target_slowdown(self, num_tokens: int) -> float:
        """By which t(n) grows while the draft runs."""
        return 1.0 + (self.pass_slowdown - 1.0) * self.pass_ms / self.target_ms(num_tokens)


PAPER = Device(step_ms=8.0, pass_ms=60.0, pass_token_ms=0.5)
"""The paper's class: a draft on an edge accelerator, a 32B target on a GPU. The slope is this
project's assumption: such a pass is bound by memory, so a token more costs little."""


def read_device(path: Path) -> Device:
    """A device from a JSON file with its attributes.

    Raises:
        ConfigurationError: the file cannot be read or is no device.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Device)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"{path} is no device: {error}") from error


def fit_device(recorded: Sequence[tuple[TimelineEntry, float]]) -> Device:
    """Read a device off sessions, each with the round trip of its link in ms.

    Lockstep gives what each model takes alone, sessions that draft ahead what they take together.
    A session's first draft and first pass hold the prompt and are left out.

    Raises:
        ConfigurationError: there are too few sessions in lockstep.
    """
    lockstep, ahead = list[_Session](), list[_Session]()
    for entry, rtt_ms in recorded:
        method = methods.find(entry.method)
        waits = method is not None and method.lockstep
        (lockstep if waits else ahead).append(_Session(entry, rtt_ms))
    drafts = [draft for session in lockstep for draft in session.drafts()]
    passes = [a_pass for session in lockstep for a_pass in session.passes()]
    if not drafts or len(passes) < 2:
        raise ConfigurationError("too few sessions in lockstep to read a device off")
    step_ms, step_slowdown, feedback_ms = 0.0, 1.0, 0.0
    for _ in range(3):  # a draft alone is what is left without the writing of feedback
        alone = [(w.took_ms - feedback_ms * w.arrivals) / w.num_tokens for w in drafts]
        step_ms = statistics.median(alone)
        step_slowdown, feedback_ms = _disturbed(
            [(step_ms * w.num_tokens, step_ms * w.num_tokens, w) for s in ahead for w in s.drafts()]
        )
    base, slope = _line([(work.num_tokens, work.took_ms) for work in passes])
    pass_slowdown, window_ms = _disturbed(
        [(base, base + slope * (work.num_tokens - 1), work) for s in ahead for work in s.passes()]
    )
    return Device(
        step_ms=step_ms,
        pass_ms=base,
        pass_token_ms=slope,
        step_slowdown=step_slowdown,
        pass_slowdown=pass_slowdown,
        start_ms=statistics.median(ms for session in lockstep for ms in session.starts()),
        message_ms=statistics.median(ms for session in lockstep for ms in session.messages()),
        window_ms=window_ms,
        feedback_ms=feedback_ms,
        step_prompt_ms=statistics.median(
            session.step_prompt_ms(step_ms * step_slowdown) for session in lockstep
        ),
        pass_prompt_ms=statistics.median(session.pass_prompt_ms() for session in lockstep),
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """A draft or a pass.

    Attributes:
        beside: share of its time in which the other model ran. arrivals: messages that came.
    """

    num_tokens: int
    took_ms: float
    beside: float
    arrivals: int


def _disturbed(works: Sequence[tuple[float, float, _Work]]) -> tuple[float, float]:
    """(slowdown while the other model runs, ms for each arrival), by least squares of what works
    took beyond what they take alone.

    Args:
        works: (ms of it that slow down, ms alone, the work).
    """
    if not works:
        return 1.0, 0.0
    causes = np.array([(slowed_ms * work.beside, work.arrivals) for slowed_ms, _, work in works])
    extra = np.array([work.took_ms - alone_ms for _, alone_ms, work in works])
    slower, each_ms = np.linalg.lstsq(causes, extra, rcond=None)[0]
    if each_ms < 0 or slower < 0:  # one of the two explains nothing
        kept = 0 if each_ms < 0 else 1
        only = float(causes[:, kept] @ extra / max(causes[:, kept] @ causes[:, kept], 1e-9))
        slower, each_ms = (only, 0.0) if kept == 0 else (0.0, only)
    return 1.0 + max(float(slower), 0.0), max(float(each_ms), 0.0)


Span = tuple[float, float]


class _Session:
    """One session's spans, with the passes that windows began placed in time: such a pass ends half
    a round trip before its feedback arrives."""

    def __init__(self, entry: TimelineEntry, rtt_ms: float) -> None:
        self._rtt_ms = rtt_ms
        self._drafts = [e for e in entry.events if isinstance(e, DraftSpan)]
        windows = [e for e in entry.events if isinstance(e, WindowSpan)]
        self._windows = [w for w in windows if w.outcome != "dropped"]
        self._arrivals = [w.at_ms + rtt_ms / 2 for w in windows]
        began = [
            PassSpan(w.end_ms - rtt_ms / 2 - w.verify_ms, w.end_ms - rtt_ms / 2, w.pass_tokens)
            for w in self._windows if w.pass_tokens
        ]  # fmt: skip
        own = [e for e in entry.events if isinstance(e, PassSpan)]
        self._passes = sorted([*began, *own], key=lambda span: span.at_ms)

    def drafts(self) -> Iterable[_Work]:
        """Each draft job, with the feedback that was written while it ran."""
        feedback_at_ms = {window.end_ms for window in self._windows}
        feedback_at_ms |= {span.end_ms + self._rtt_ms / 2 for span in self._passes}
        passes = [(span.at_ms, span.end_ms) for span in self._passes]
        for span in self._drafts[1:]:
            if span.num_tokens:
                own = (span.at_ms, span.end_ms)
                arrivals = sum(span.at_ms <= at <= span.end_ms for at in feedback_at_ms)
                beside = _overlap(own, passes)
                yield _Work(span.num_tokens, span.end_ms - span.at_ms, beside, arrivals)

    def passes(self) -> Iterable[_Work]:
        """Each pass, with the windows that came while it ran."""
        drafts = [(span.at_ms, span.end_ms) for span in self._drafts]
        for span in self._passes[1:]:
            own = (span.at_ms, span.end_ms)
            arrivals = sum(own[0] < at <= own[1] for at in self._arrivals)
            took_ms, beside = span.end_ms - span.at_ms, _overlap(own, drafts)
            yield _Work(span.num_tokens, took_ms, beside, arrivals)

    def step_prompt_ms(self, step_ms: float) -> float:
        """What the first draft took besides its tokens, the other model reading its prompt."""
        first = self._drafts[0]
        return max(0.0, first.end_ms - first.at_ms - step_ms * first.num_tokens)

    def pass_prompt_ms(self) -> float:
        """From the session's opening, half a round trip after its beginning, to the first pass."""
        return max(0.0, self._passes[0].at_ms - self._rtt_ms / 2)

    def starts(self) -> Iterable[float]:
        """From each feedback to the beginning of the draft after it, in lockstep."""
        ends = [window.end_ms for window in self._windows]
        for end in ends[:-1]:
            later = [span.at_ms for span in self._drafts if span.at_ms >= end]
            if later:
                yield min(later) - end

    def messages(self) -> Iterable[float]:
        """What each window took from the end of its draft to its feedback, less link and cloud."""
        for span, window in zip(self._drafts[1:], self._windows[1:], strict=False):
            yield max(0.0, window.end_ms - span.end_ms - self._away_ms(window))

    def _away_ms(self, window: WindowSpan) -> float:
        return self._rtt_ms + window.verify_ms + window.queue_ms


def _overlap(own: Span, others: Sequence[Span]) -> float:
    """Share of `own` that lies in others; those do not overlap one another."""
    begin, end = own
    shared = sum(max(0.0, min(end, b) - max(begin, a)) for a, b in others)
    return shared / max(end - begin, 1e-9)


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """t(1) and ms a token more: Theil and Sen's line through the medians of each length, which a
    few late passes do not move."""
    lengths = sorted({n for n, _ in points})
    medians = [statistics.median(ms for n, ms in points if n == length) for length in lengths]
    weights = [sum(n == length for n, _ in points) for length in lengths]
    kept = [i for i, weight in enumerate(weights) if weight >= max(weights) / 20]
    pairs = [(lengths[i], medians[i]) for i in kept]
    slopes = [
        (b - a) / (m - n) for (n, a), (m, b) in ((p, q) for p in pairs for q in pairs) if m > n
    ]
    slope = max(0.0, statistics.median(slopes)) if slopes else 0.0
    base = float(np.median([ms - slope * (n - 1) for n, ms in pairs]))
    return base, slope
