"""The speed to expect: tokens a second of each method, predicted from measured times.

What is measured: c, a draft step; t(n), a target pass over n tokens; how much each slows down while
the other model runs; the share of tokens at which the draft is right; the round trip. What is
predicted by them, with the simulation of `bench.simulate`, is tokens a second. With a running
system the times are those of its own windows, where it has answered enough; else the models are
loaded and timed here.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import msgspec

from bench.doctor.checks import Check, ok, warning
from bench.simulate.device import Device
from bench.simulate.predict import Hits, alone, named, predict, random_answers
from bus.protocol.messages import Outcome
from bus.store import WindowEntry
from decoding import methods
from decoding.methods import Method

__all__ = [
    "ALONE",
    "METHODS",
    "USUAL_RTT_MS",
    "Expectation",
    "LinkPrediction",
    "PairCosts",
    "Way",
    "check_expectation",
    "costs_of",
    "num_predictions",
    "pass_times",
    "predict_all",
    "rising",
]

ALONE = "target alone"
METHODS = ("sd", "plc", "auto", "e2sci")
USUAL_RTT_MS = 40.0
"""The round trip that predictions are also made for: that of a mobile network."""
LEAST_WINDOWS = 30
_LEAST_PASSES = 5
"""Of one length, before their median is believed."""
_SHORT, _LONG = 2, 4
"""Tokens of the shortest and of the longest pass that must have been seen."""
_NEWEST = 2000
_ANSWERS, _LENGTH, _SEED = 6, 96, 0
_PAYS = 1.03
"""Times the target alone, from which on a method counts as faster: less is noise."""


class PairCosts(msgspec.Struct, frozen=True):
    """A pair's times and its acceptance; measured.

    Attributes:
        where: they were measured, for a sentence. target, draft: models, or workers of them.
        device: the times. acceptance: share of tokens at which the draft is right.
        num_tokens: that the acceptance was counted on.
        hits: for each token of some answers, whether the draft is right; empty: not known one by
            one.
        round_trip_ms: as the edge sees it, with what both workers do to a message; None where no
            system runs.
    """

    where: str
    target: str
    draft: str
    device: Device
    acceptance: float
    num_tokens: int
    hits: tuple[Hits, ...] = ()
    round_trip_ms: float | None = None
    source: str = "measured"


class LinkPrediction(msgspec.Struct, frozen=True):
    """Method → tokens a second over one round trip; predicted.

    Attributes:
        rtt_source: `measured`, `assumed`, or `none` where there is no link.
        shared: whether both models run on one machine, where each slows the other down.
        lower_bounds: methods of which the figure is one: a lossy rule also accepts tokens at which
            the draft is not right.
    """

    rtt_ms: float
    rtt_source: str
    shared: bool
    tokens_per_s: dict[str, float]
    lower_bounds: tuple[str, ...] = ("e2sci",)
    source: str = "predicted"

    def gain(self, method: str) -> float:
        """Times the target alone."""
        return self.tokens_per_s[method] / self.tokens_per_s[ALONE]

    @property
    def best(self) -> str:
        """The fastest method; the target alone where none is faster."""
        return max(self.tokens_per_s, key=self.tokens_per_s.__getitem__)


class Way(NamedTuple):
    """A link to predict for; fields as those of `LinkPrediction`."""

    rtt_ms: float
    rtt_source: str
    shared: bool


class Expectation(msgspec.Struct, frozen=True):
    """What was measured, and what it predicts."""

    costs: PairCosts
    links: tuple[LinkPrediction, ...]


def costs_of(entries: Sequence[WindowEntry]) -> PairCosts | None:
    """Times and acceptance of the pair of workers that answers most, from its latest windows.

    A session's first window waits for its prompt and is left out, and so is what a speculator has
    proposed. Acceptance is that of lossless methods. Times of methods that draft ahead hold the
    slowdown of two models that run at once on one machine.

    Returns:
        None where there are fewer than `LEAST_WINDOWS` windows, or too few passes of different
        lengths to know t(n) without guessing.
    """
    drafted = [e for e in entries[-_NEWEST:] if e.num_drafted and not e.proposed]
    if not drafted:
        return None
    pair, _ = Counter((e.edge, e.cloud) for e in drafted).most_common(1)[0]
    sessions: dict[str, list[WindowEntry]] = defaultdict(list)
    for entry in entries[-_NEWEST:]:
        if (entry.edge, entry.cloud) == pair and not entry.proposed:
            sessions[entry.session].append(entry)
    rest = [windows[1:] for windows in sessions.values() if len(windows) > 1]
    exact = [e for windows in rest for e in windows if e.num_drafted and _is_lossless(e)]
    points = pass_times(rest)
    if len(exact) < LEAST_WINDOWS or not points:
        return None
    accepted = sum(e.num_accepted for e in exact)
    judged = accepted + sum(e.num_accepted < e.num_drafted for e in exact)
    return PairCosts(
        where="in the running system",
        target=pair[1],
        draft=pair[0],
        device=Device(_step_ms(rest), points[0][1], passes=points),
        acceptance=accepted / judged,
        num_tokens=judged,
        round_trip_ms=statistics.median(e.rtt_ms for e in exact),
    )


def _is_lossless(entry: WindowEntry) -> bool:
    method = methods.find(entry.method)
    return method is not None and method.lossless


def _step_ms(sessions: Sequence[Sequence[WindowEntry]]) -> float:
    """What a drafted token costs, those that lookup gives for nothing among them: the median of
    the sessions."""
    drafts = [[e for e in windows if e.num_drafted] for windows in sessions]
    return max(1e-3, statistics.median(
        sum(e.draft_ms for e in windows) / sum(e.num_drafted for e in windows)
        for windows in drafts if windows
    ))  # fmt: skip


def pass_times(sessions: Sequence[Sequence[WindowEntry]]) -> tuple[tuple[int, float], ...]:
    """t(n) at the lengths of which there are enough passes, medians; empty where they do not reach
    from short passes to long ones.

    Windows that one pass has judged carry the same time. Its length is known where it judged all
    that it ran: in lockstep, where every token was accepted, and where the target wrote alone.
    """
    times: dict[int, list[float]] = defaultdict(list)
    for windows in sessions:
        for verify_ms, group in groupby(windows, key=lambda entry: entry.verify_ms):
            judged = list(group)
            if verify_ms > 0.0 and all(map(_is_whole, judged)):
                times[1 + sum(e.num_drafted for e in judged)].append(verify_ms)
    points = {n: statistics.median(ms) for n, ms in times.items() if len(ms) >= _LEAST_PASSES}
    if not points or min(points) > _SHORT or max(points) < _LONG:
        return ()
    return rising(points)


def _is_whole(entry: WindowEntry) -> bool:
    if entry.outcome == Outcome.PREHIT_REJECTED.value:
        return False  # no pass was run
    method = methods.find(entry.method)
    return entry.num_accepted == entry.num_drafted or (method is not None and method.lockstep)


def rising(times_ms: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    """Points by length; a longer pass that chance made look faster takes as long as the one
    before."""
    points, least_ms = [], 0.0
    for length, ms in sorted(times_ms.items()):
        least_ms = max(least_ms, ms)
        points.append((length, least_ms))
    return tuple(points)


def predict_all(
    costs: PairCosts, ways: Sequence[Way], tick: Callable[[], None] = lambda: None
) -> Expectation:
    """Every method over every link.

    Args:
        tick: called after each of `num_predictions(ways)`.
    """
    answers = list(costs.hits) or random_answers(1.0 - costs.acceptance, _ANSWERS, _LENGTH, _SEED)
    apart = msgspec.structs.replace(costs.device, step_slowdown=1.0, pass_slowdown=1.0)
    handling_ms = _handling_ms(costs, ways)
    found = []
    for way in ways:
        device = costs.device if way.shared else apart
        device = msgspec.structs.replace(device, message_ms=handling_ms)
        speeds = {ALONE: alone(answers, way.rtt_ms, device).tokens_per_s}
        tick()
        for name in METHODS:
            predicted = predict(_simulated(name), answers, way.rtt_ms, device)
            speeds[name] = predicted.tokens_per_s
            tick()
        found.append(LinkPrediction(*way, speeds))
    return Expectation(costs, tuple(found))


def _handling_ms(costs: PairCosts, ways: Sequence[Way]) -> float:
    """What a window and its feedback take besides link, pass and queue: the edge's round trip less
    the measured one."""
    measured = [way.rtt_ms for way in ways if way.rtt_source == "measured"]
    if costs.round_trip_ms is None or not measured:
        return 0.0
    return max(0.0, costs.round_trip_ms - measured[0])


def num_predictions(ways: Sequence[Way]) -> int:
    return len(ways) * (1 + len(METHODS))


def _simulated(name: str) -> Method:
    """The method; a lossy one with the exact rule, since the simulation has no probabilities."""
    method = named(name)
    return method if method.lossless else replace(method, acceptance=named("auto").acceptance)


def check_expectation(found: Expectation) -> list[Check]:
    """A sentence for each round trip, and one for what was measured."""
    costs = found.costs
    device = costs.device
    sentence = (
        f"{costs.where.capitalize()} a draft step takes {device.step_ms:.1f} ms, a target pass "
        f"{device.target_ms(1):.1f} ms for one token and {device.target_ms(8):.1f} for eight; the "
        f"draft is right at {costs.acceptance:.0%} of {costs.num_tokens} tokens (measured)."
    )
    measured = ok(
        "times", sentence, step_ms=device.step_ms, pass_1_ms=device.target_ms(1),
        pass_8_ms=device.target_ms(8), step_slowdown=device.step_slowdown,
        pass_slowdown=device.pass_slowdown, acceptance=costs.acceptance,
    )  # fmt: skip
    return [measured, *map(_speed, found.links)]


def _speed(link: LinkPrediction) -> Check:
    where = {
        "measured": f"At the measured round trip of {link.rtt_ms:.1f} ms",
        "assumed": f"At a round trip of {link.rtt_ms:g} ms",
        "none": "Without a link",
    }[link.rtt_source] + (", both models on one machine," if link.shared else "")
    auto, own = link.tokens_per_s["auto"], link.tokens_per_s[ALONE]
    sentence = (
        f"{where} auto is predicted to give {auto:.0f} tokens/s, {link.gain('auto'):.2f} × the "
        f"target alone ({own:.0f})"
    )
    figures = {"rtt_ms": round(link.rtt_ms, 3)} | {
        f"{name.replace(' ', '_')}_tokens_per_s": round(speed, 2)
        for name, speed in link.tokens_per_s.items()
    }
    best = link.best
    if best == ALONE or link.gain(best) < _PAYS:
        return warning(
            "speed", f"{sentence}: speculation does not pay here, no method is predicted to be "
            "faster than the target alone.",
            "Keep auto, which then leaves the text to the target; a larger target, a cheaper "
            "draft or a shorter round trip changes this.", **figures,
        )  # fmt: skip
    if best == "auto":
        return ok("speed", f"{sentence}; no other method is predicted to be faster.", **figures)
    return ok("speed", f"{sentence}; {best} is predicted to give {link.tokens_per_s[best]:.0f}.",
              **figures)  # fmt: skip
