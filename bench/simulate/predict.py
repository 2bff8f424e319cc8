"""Tokens a second of a method on many answers, and the best static window."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.simulate.device import Device
from bench.simulate.pair import Outcome, SimulatedSession
from bench.windows import WINDOWS
from bus.protocol.errors import ConfigurationError
from decoding import methods
from decoding.methods import Method
from edge_worker.memory import PathMemory

Hits = tuple[bool, ...]
"""For each token of an answer, whether the draft would have written it."""
ALONE = dataclasses.replace(methods.plc.METHOD, name="alone", runs_on=True)
"""The target by itself, streaming over the link: what a client without a draft sees."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A method on some answers, one session after the other; simulated.

    Attributes:
        tokens_per_s: after the first pass, over all answers.
        edge_idle: share of the time in which the draft does not draft. wasted: share of the
            drafted tokens that are thrown away.
    """

    method: str
    tokens_per_s: float
    edge_idle: float
    wasted: float
    source: str = "simulated"


def named(method_name: str) -> Method:
    """A method.

    Raises:
        ConfigurationError: there is no such method, or it cannot be simulated.
    """
    method = methods.find(method_name)
    if method is None:
        raise ConfigurationError(f"method: {methods.why_unknown(method_name)}")
    if method.inner:
        raise ConfigurationError(
            f"{method_name!r} has a middle worker, which the simulation lacks; measure it with "
            "`e2sci bench`, or simulate one without, such as auto"
        )
    return method


def predict(
    method: Method, answers: Sequence[Hits], rtt_ms: float, device: Device, drafts: bool = True
) -> Prediction:
    """Simulate. As in the edge worker, a session begins with what the one before has learnt."""
    memory, outcomes = PathMemory(), list[Outcome]()
    for seed, agrees in enumerate(answers):
        recalled = memory.recall("cloud", method.name)
        outcome = SimulatedSession(
            method, agrees, rtt_ms, device, recalled, drafts, seed=seed
        ).run()
        memory.keep("cloud", method.name, outcome.measures)
        outcomes.append(outcome)
    drafted = sum(outcome.drafted_tokens for outcome in outcomes)
    accepted = sum(outcome.accepted_tokens for outcome in outcomes)
    return Prediction(
        method.name,
        _speed(outcomes),
        statistics.fmean(outcome.timeline.shares().edge_idle for outcome in outcomes),
        max(0.0, 1 - accepted / max(drafted, 1)),
    )


def alone(answers: Sequence[Hits], rtt_ms: float, device: Device) -> Prediction:
    """The target by itself over the same link: a thin client."""
    return predict(ALONE, answers, rtt_ms, device, drafts=False)


def _speed(outcomes: Sequence[Outcome]) -> float:
    """As in `bench.pace`: tokens after the first pass ÷ time from its feedback to the last one.

    Feedback of one pass arrives together.
    """
    tokens, millis = 0, 0.0
    for outcome in outcomes:
        first_ms = outcome.pieces[0][0]
        tokens += sum(count for at_ms, count in outcome.pieces if at_ms > first_ms)
        millis += outcome.pieces[-1][0] - first_ms
    return 1e3 * tokens / max(millis, 1e-9)


def best_static(answers: Sequence[Hits], rtt_ms: float, device: Device) -> Prediction:
    """`sd` with the window that is fastest on these answers."""
    found = [predict(named(f"sd:{window}"), answers, rtt_ms, device) for window in WINDOWS]
    return max(found, key=lambda prediction: prediction.tokens_per_s)


def random_answers(error_rate: float, num_answers: int, length: int, seed: int) -> list[Hits]:
    """Answers on which a draft is wrong at each token with probability `error_rate`."""
    rng = random.Random(seed)
    return [tuple(rng.random() >= error_rate for _ in range(length)) for _ in range(num_answers)]


def ceiling(error_rate: float, rtt_ms: float, device: Device) -> float:
    """The best of a single chain, tokens a second: N per N·c + RTT + t(1), N = 1/error rate."""
    tokens = 1 / error_rate
    return 1e3 * tokens / (tokens * device.step_ms + rtt_ms + device.pass_ms)
