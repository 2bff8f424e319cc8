"""What a link is like, constant or over time: conditions, traces, the table of profiles.

Delays of profiles are named by their round trip, as ping shows it; each direction has half of it.
This module knows no clock and no sockets: times are nanoseconds since the link's first connection.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from bus.protocol.errors import ConfigurationError

__all__ = ["PROFILES", "Conditions", "Profile", "Trace", "find_link", "parse_trace"]

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000

_Delay = Annotated[float, Meta(ge=0, le=60_000)]
_Rate = Annotated[float, Meta(ge=0.001)]
_Share = Annotated[float, Meta(ge=0, le=0.5)]
_Time = Annotated[float, Meta(ge=0, le=1e6)]


class Conditions(msgspec.Struct, frozen=True):
    """What holds in each direction for a while.

    Attributes:
        one_way_ms: least time from one end to the other.
        jitter_ms: mean of a random delay on top, exponential and cut off at four times the mean.
        mbps: megabits a second, headers counted; None is unlimited.
        loss: share of packets that have to be sent again.
        outage: nothing passes.
    """

    one_way_ms: _Delay
    jitter_ms: _Delay = 0.0
    mbps: _Rate | None = None
    loss: _Share = 0.0
    outage: bool = False


class Trace:
    """Conditions over time: each holds from its start to the next one's, the last for ever or,
    with `period_s`, until everything begins again.

    Raises:
        ConfigurationError: the first does not start at 0, starts do not rise, or it is an outage
            that never ends.
    """

    def __init__(
        self, steps: Sequence[tuple[float, Conditions]], period_s: float | None = None
    ) -> None:
        self.steps = tuple(steps)
        self.period_s = period_s
        self._starts_ns = [round(at_s * NS_PER_S) for at_s, _ in steps]
        self._period_ns = None if period_s is None else round(period_s * NS_PER_S)
        ends_ns = [*self._starts_ns, *([] if self._period_ns is None else [self._period_ns])]
        if not steps or self._starts_ns[0] != 0:
            raise ConfigurationError("a link's trace starts at 0 seconds")
        if any(later <= earlier for earlier, later in pairwise(ends_ns)):
            raise ConfigurationError("the times of a link's trace must rise")
        last = [steps[-1][1]] if period_s is None else [conditions for _, conditions in steps]
        if all(conditions.outage for conditions in last):
            raise ConfigurationError("a link's trace must not be an outage for ever")

    def at(self, time_ns: int) -> Conditions:
        """The conditions at a time."""
        return self.steps[self._locate(time_ns)[0]][1]

    def open_from(self, time_ns: int) -> int:
        """The first moment from `time_ns` on that lies in no outage."""
        index, base_ns = self._locate(time_ns)
        while self.steps[index][1].outage:
            index += 1
            if index == len(self.steps):
                assert self._period_ns is not None  # __init__ refuses a last step without end
                index, base_ns = 0, base_ns + self._period_ns
            time_ns = base_ns + self._starts_ns[index]
        return time_ns

    def _locate(self, time_ns: int) -> tuple[int, int]:
        """The step that holds at a time, and when its round of the trace began."""
        base_ns = 0 if self._period_ns is None else time_ns - time_ns % self._period_ns
        return bisect_right(self._starts_ns, time_ns - base_ns) - 1, base_ns


@dataclass(frozen=True, slots=True)
class Profile:
    """A link with a name."""

    name: str
    what: str
    trace: Trace


def _constant(
    round_trip_ms: float, jitter_ms: float = 0.0, mbps: float | None = None, loss: float = 0.0
) -> Trace:
    return Trace([(0.0, Conditions(round_trip_ms / 2, jitter_ms, mbps, loss))])


def _with_outages(conditions: Conditions, every_s: float, for_s: float) -> Trace:
    away = msgspec.structs.replace(conditions, outage=True)
    return Trace([(0.0, conditions), (every_s - for_s, away)], period_s=every_s)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("loopback", "nothing added but the relay itself", _constant(0)),
        Profile("lan", "1 ms", _constant(1)),
        Profile("metro", "10 ms", _constant(10)),
        Profile("5g", "40 ms, 20 Mbit/s, jitter 4 ms", _constant(40, 4, 20)),
        Profile("wan", "80 ms", _constant(80)),
        Profile("satellite", "300 ms", _constant(300)),
        Profile("lossy", "80 ms, 20 Mbit/s, 2 % of packets sent again", _constant(80, 2, 20, 0.02)),
        Profile(
            "outages",
            "as 5g, and nothing passes in the last 0.6 s of every 5 s",
            _with_outages(Conditions(20, 4, 20), every_s=5, for_s=0.6),
        ),
    )
}
"""The profiles by name; times are round trips. docs/link.md shows them as a table."""

_ROUND_TRIP = re.compile(r"(\d+(?:\.\d+)?)ms")


def find_link(spec: str) -> Trace:
    """The link that `spec` means: a profile's name, a round trip like `40ms`, or a trace file.

    Raises:
        ConfigurationError: it is none of them, or the file is no trace.
    """
    if profile := PROFILES.get(spec):
        return profile.trace
    if match := _ROUND_TRIP.fullmatch(spec):
        return _constant(_checked(float(match[1]), spec))
    path = Path(spec)
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"there is no link {spec!r}; use {', '.join(PROFILES)}, a round trip such as 40ms, or "
            f"a trace file (as a file: {error})"
        ) from None
    try:
        return parse_trace(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def _checked(round_trip_ms: float, spec: str) -> float:
    try:
        return msgspec.convert(round_trip_ms, _Delay)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"link {spec}: {error}") from None


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a trace file: when, and what changes then."""

    at_s: _Time
    one_way_ms: _Delay | UnsetType = UNSET
    jitter_ms: _Delay | UnsetType = UNSET
    mbps: _Rate | UnsetType | None = UNSET
    loss: _Share | UnsetType = UNSET
    outage: bool | UnsetType = UNSET
    repeat: bool = False


def parse_trace(text: str) -> Trace:
    """A trace from JSON Lines.

    Each line is an object with `at_s` and those of `one_way_ms`, `jitter_ms`, `mbps`, `loss` and
    `outage` that change then; the first has at least `one_way_ms`. A last line with `at_s` and
    `"repeat": true` begins the trace again at that time.

    Raises:
        ConfigurationError: a line is wrong (the text says which), or see `Trace`.
    """
    steps: list[tuple[float, Conditions]] = []
    period_s: float | None = None
    for number, raw in enumerate(text.splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            line = msgspec.json.decode(raw, type=_Line)
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"line {number}: {error}") from None
        if period_s is not None:
            raise ConfigurationError(f"line {number}: nothing may follow the line that repeats")
        if line.repeat:
            period_s = line.at_s
        else:
            steps.append((line.at_s, _changed(steps, line, number)))
    return Trace(steps, period_s)


def _changed(steps: list[tuple[float, Conditions]], line: _Line, number: int) -> Conditions:
    names = Conditions.__struct_fields__
    changes = {name: v for name in names if (v := getattr(line, name)) is not UNSET}
    if steps:
        return msgspec.structs.replace(steps[-1][1], **changes)
    if "one_way_ms" not in changes:
        raise ConfigurationError(f"line {number}: the first line needs one_way_ms")
    return Conditions(**changes)
