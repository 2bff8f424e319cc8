"""The speed to expect: tokens a second of each method, predicted from measured times.

What is measured: c, a draft step; t(n), a target pass over n tokens; how much each slows down while
the other model runs; the share of tokens at which the draft is right; the round trip. What is
predicted by them, with the simulation of `bench.simulate`, is tokens a second. With a running
system the times are those of its own windows, where it has answered enough; else the models are
loaded and timed here.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec

from bench.doctor.checks import Check, ok, warning
from bench.simulate.device import Device
from bench.simulate.predict import Hits, alone, named, predict, random_answers
from bus.protocol.messages import Outcome
from bus.store import WindowEntry
from decoding import methods
from decoding.methods import Method
from decoding.pacing import PassTimes

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
    "predict_all",
]

ALONE = "target alone"
METHODS = ("sd", "plc", "auto", "e2sci")
USUAL_RTT_MS = 40.0
"""The round trip that predictions are also made for: that of a mobile network."""
LEAST_WINDOWS = 30
_NEWEST = 2000
_ANSWERS, _LENGTH, _SEED = 6, 96, 0
_PAYS = 1.03
"""Times the target alone, from which on a method counts as faster: less is noise."""


class PairCosts(msgspec.Struct, frozen=True):
    """A pair's times and its acceptance; measured.

    Attributes:
        where: what they were measured on. target, draft: models, or workers of them.
        device: the times. acceptance: share of tokens at which the draft is right.
        num_tokens: that the acceptance was counted on.
        hits: for each token of some answers, whether the draft is right; empty: not known one by
            one.
    """

    where: str
    target: str
    draft: str
    device: Device
    acceptance: float
    num_tokens: int
    hits: tuple[Hits, ...] = ()
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
    proposed. A window's pass runs its tokens and one more, t(n) is the line that `decoding.pacing`
    fits; acceptance is that of lossless methods. Times of methods that draft ahead hold the
    slowdown of two models that run at once.

    Returns:
        None where there are fewer than `LEAST_WINDOWS` windows.
    """
    drafted = [e for e in entries[-_NEWEST:] if e.num_drafted and not e.proposed]
    if not drafted:
        return None
    (edge, cloud), _ = Counter((e.edge, e.cloud) for e in drafted).most_common(1)[0]
    seen = set[str]()
    windows, passes = list[WindowEntry](), PassTimes()
    for entry in entries[-_NEWEST:]:
        if (entry.edge, entry.cloud) != (edge, cloud) or entry.proposed:
            continue
        if entry.session not in seen:
            seen.add(entry.session)
            continue
        if entry.num_drafted:
            windows.append(entry)
        if entry.verify_ms > 0.0 and entry.outcome != Outcome.PREHIT_REJECTED.value:
            passes = passes.sample(1 + entry.num_drafted, entry.verify_ms)
    exact = [e for e in windows if (m := methods.find(e.method)) is not None and m.lossless]
    if len(exact) < LEAST_WINDOWS or not passes.known:
        return None
    accepted = sum(e.num_accepted for e in exact)
    judged = accepted + sum(e.num_accepted < e.num_drafted for e in exact)
    base_ms, token_ms = passes.line()
    step_ms = statistics.median(e.draft_ms / e.num_drafted for e in windows)
    return PairCosts(
        where="the running system",
        target=cloud,
        draft=edge,
        device=Device(max(step_ms, 1e-3), base_ms + token_ms, token_ms),
        acceptance=accepted / judged,
        num_tokens=judged,
    )


def predict_all(
    costs: PairCosts, ways: Sequence[Way], tick: Callable[[], None] = lambda: None
) -> Expectation:
    """Every method over every link.

    Args:
        tick: called after each of `num_predictions(ways)`.
    """
    answers = list(costs.hits) or random_answers(1.0 - costs.acceptance, _ANSWERS, _LENGTH, _SEED)
    apart = msgspec.structs.replace(costs.device, step_slowdown=1.0, pass_slowdown=1.0)
    found = []
    for way in ways:
        device = costs.device if way.shared else apart
        speeds = {ALONE: alone(answers, way.rtt_ms, device).tokens_per_s}
        tick()
        for name in METHODS:
            predicted = predict(_simulated(name), answers, way.rtt_ms, device)
            speeds[name] = predicted.tokens_per_s
            tick()
        found.append(LinkPrediction(*way, speeds))
    return Expectation(costs, tuple(found))


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
        f"On {costs.where} a draft step takes {device.step_ms:.1f} ms, a target pass "
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
