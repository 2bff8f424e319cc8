"""What a pair of devices takes, in milliseconds; and how to read it off measured sessions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from bus.errors import ConfigurationError
from bus.store import DraftSpan, TimelineEntry, WindowSpan

_Work = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_Millis = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Factor = Annotated[float, msgspec.Meta(ge=1, le=1e3)]


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Draft and target, and what surrounds them.

    Attributes:
        step_ms: c, a draft step while the target does nothing.
        pass_ms, pass_token_ms: t(n) = pass_ms + pass_token_ms·(n − 1), while the draft is idle.
        step_slowdown, pass_slowdown: factors while the other model runs; 1 on two machines.
        start_ms: from a verdict, or from a draft's end, to the beginning of the next draft.
        message_ms: what a window and its verdict take besides link, pass and queue, together.
    """

    step_ms: _Work
    pass_ms: _Work
    pass_token_ms: _Millis = 0.0
    step_slowdown: _Factor = 1.0
    pass_slowdown: _Factor = 1.0
    start_ms: _Millis = 0.0
    message_ms: _Millis = 0.0

    def target_ms(self, num_tokens: int) -> float:
        """t(n), alone."""
        return self.pass_ms + self.pass_token_ms * (num_tokens - 1)


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
    lockstep = [_Session(e, rtt_ms) for e, rtt_ms in recorded if e.method.startswith("sd")]
    ahead = [_Session(e, rtt_ms) for e, rtt_ms in recorded if not e.method.startswith("sd")]
    steps = [step for session in lockstep for step, _ in session.steps()]
    passes = [p for session in lockstep for p in session.passes()]
    if not steps or len(passes) < 2:
        raise ConfigurationError("too few sessions in lockstep to read a device off")
    step_ms = statistics.median(steps)
    base, slope = _line([(n, ms) for n, ms, _ in passes])
    together = [step for session in ahead for step, share in session.steps() if share > 0.9]
    slowed = [
        ms / (base + slope * (n - 1))
        for session in ahead for n, ms, share in session.passes() if share > 0.9
    ]  # fmt: skip
    return Device(
        step_ms=step_ms,
        pass_ms=base,
        pass_token_ms=slope,
        step_slowdown=max(1.0, statistics.median(together) / step_ms) if together else 1.0,
        pass_slowdown=max(1.0, statistics.median(slowed)) if slowed else 1.0,
        start_ms=statistics.median(s for session in lockstep for s in session.starts()),
        message_ms=statistics.median(m for session in lockstep for m in session.messages()),
    )


Span = tuple[float, float]


class _Session:
    """One session's spans, with the passes placed in time: a pass ends half a round trip before
    its verdict arrives."""

    def __init__(self, entry: TimelineEntry, rtt_ms: float) -> None:
        self._rtt_ms = rtt_ms
        self._drafts = [e for e in entry.events if isinstance(e, DraftSpan)]
        windows = [e for e in entry.events if isinstance(e, WindowSpan)]
        self._windows = [w for w in windows if w.outcome != "dropped"]
        self._passes = [
            (w.end_ms - rtt_ms / 2 - w.verify_ms, w.end_ms - rtt_ms / 2)
            for w in self._windows if w.pass_tokens
        ]  # fmt: skip

    def steps(self) -> Iterable[tuple[float, float]]:
        """(ms a token, share of it in which the target ran) of each draft job."""
        for span in self._drafts[1:]:
            if span.num_tokens:
                own = (span.at_ms, span.end_ms)
                yield (span.end_ms - span.at_ms) / span.num_tokens, _overlap(own, self._passes)

    def passes(self) -> Iterable[tuple[int, float, float]]:
        """(tokens, ms, share of it in which the draft ran) of each pass."""
        drafts = [(span.at_ms, span.end_ms) for span in self._drafts]
        judged = [w for w in self._windows if w.pass_tokens]
        for window, own in list(zip(judged, self._passes, strict=True))[1:]:
            yield window.pass_tokens, window.verify_ms, _overlap(own, drafts)

    def starts(self) -> Iterable[float]:
        """From each verdict to the beginning of the draft behind it, in lockstep."""
        ends = [window.end_ms for window in self._windows]
        for end in ends[:-1]:
            later = [span.at_ms for span in self._drafts if span.at_ms >= end]
            if later:
                yield min(later) - end

    def messages(self) -> Iterable[float]:
        """What each window took from the end of its draft to its verdict, less link and cloud."""
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
