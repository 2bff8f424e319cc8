"""Credit inertia: a threshold that follows how well the recent windows went (docs/method.md).

    p_acc(t) = E[L_acc] / W_t
    r̂_t      = (1 − β)·r̂_{t−1} + β·p_acc(t)          credit
    T_t      = clip(T_base + α_s·ω_t·(r̂_t − τ), T_min, T_max)

What this project adds [ours]:

- **Neutral credit τ depends on the window.** The same draft gets a smaller p_acc in longer windows,
  and drafting ahead sends messages of 1 … 4 tokens. So a window's *excess* is p_acc − τ(W), and
  r̂ − τ is the same exponential average over the excesses: with windows of one size, the letter.
- **Memory.** r̂ is the average over the last k windows, begun at neutral. With fewer than k that is
  the recursion itself; what is older than k windows has no say.
- **Changes of text.** A cumulative sum (Page, 1954) of how far windows fall below the credit that
  preceded them; past a limit the memory is emptied, so that credit is neutral at once.
- **Calm.** No change smaller than a band, and none within a few windows of the last one, except at
  such an alarm.
- **Safety.** No threshold beyond the greatest whose calibrated quality holds; the conservative one
  where none does. The paper falls to the conservative one at once, which would be strictest in the
  best stretches, where credit asks for more than is safe.

The target threshold is Lipschitz in r̂ with constant α_s·ω_max, and calm adds at most one band to
that: the bounded change that Theorem 4.1 takes for granted.

This module knows no session and no Redis: a state and a window's report go in, a state comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Protocol

from bus.protocol.messages import WindowReport
from decoding.control import ControlState

NEUTRAL_RATE = 0.806
"""Before calibration, the chance a that a token of a neutral text is accepted [ours]: in windows of
4, Σaⁱ/4 = 0.6, the threshold between high and low credit that the paper suggests."""
REFERENCE_WINDOW = 4
"""r̂ is told as that of windows of this size."""


def neutral_acceptance(window: int) -> float:
    """τ(W) before calibration: Σ_{i≤W} aⁱ / W."""
    a = NEUTRAL_RATE
    return a * (1.0 - a**window) / (1.0 - a) / window


def interpolated_neutral(neutral: Mapping[int, float], window: int) -> float:
    """τ(W) for any W: that of the nearest window tried, along the curve that holds before
    calibration."""
    if not neutral:
        return neutral_acceptance(window)
    nearest = min(neutral, key=lambda tried: (abs(tried - window), tried))
    shape = neutral_acceptance(window) / neutral_acceptance(nearest)
    return min(neutral[nearest] * shape, 1.0)


@dataclass(frozen=True, slots=True)
class Advice:
    """What a predictor says for (r̂, Δr̂): ω > 0 scales the threshold's move, W is the window."""

    omega: float
    window: int


class Predictor(Protocol):
    """g_θ (docs/method.md, Threshold and predictor)."""

    def __call__(self, credit: float, credit_delta: float) -> Advice:
        """Pure, and quick: it is asked after every window."""
        ...


@dataclass(frozen=True, slots=True)
class ConstantPredictor:
    """The same advice always; for sessions without a calibration."""

    advice: Advice

    def __call__(self, credit: float, credit_delta: float) -> Advice:  # noqa: ARG002
        return self.advice


def always_safe(credit: float) -> float:  # noqa: ARG001 - nothing is known
    """The safety check of a controller that has no calibration: every threshold holds."""
    return math.inf


@dataclass(frozen=True, slots=True)
class CreditLaw:
    """The numbers of the law; defaults are this project's choice until calibrated [ours].

    Attributes:
        base, least, most: T_base, T_min, T_max in nats of Jensen-Shannon divergence.
        conservative: used where no threshold keeps quality.
        gain: α_s. smoothing: β, the weight of the newest window. memory: k windows.
        band: nats; a smaller change is not made. hold: windows between two changes.
        slack, alarm: of the cumulative sum of drops: a window counts by how much more than `slack`
            it lies below credit; beyond `alarm` the memory is emptied.
        neutral: τ(W).
        predictor: (r̂, Δr̂) → (ω, W).
        safe: credit → the greatest threshold whose calibrated quality holds.
    """

    base: float = 0.15
    least: float = 0.02
    most: float = 0.30
    conservative: float = 0.02
    gain: float = 1.0
    smoothing: float = 0.3
    memory: int = 5
    band: float = 0.01
    hold: int = 2
    slack: float = 0.25
    alarm: float = 0.75
    neutral: Callable[[int], float] = neutral_acceptance
    predictor: Predictor = field(default_factory=lambda: ConstantPredictor(Advice(1.0, 4)))
    safe: Callable[[float], float] = always_safe

    def excess_credit(self, history: tuple[float, ...]) -> float:
        """r̂ − τ: the exponential average of excesses, oldest first, begun at 0."""
        value = 0.0
        for excess in history[-self.memory :]:
            value += self.smoothing * (excess - value)
        return value

    def credit(self, history: tuple[float, ...]) -> float:
        """r̂ as that of windows of `REFERENCE_WINDOW`, in 0 … 1."""
        return _clip(self.neutral(REFERENCE_WINDOW) + self.excess_credit(history), 0.0, 1.0)

    def threshold(self, excess: float, credit: float, omega: float) -> float:
        """T before calm: clip(T_base + α_s·ω·(r̂ − τ)), no more than is safe."""
        wanted = _clip(self.base + self.gain * omega * excess, self.least, self.most)
        return min(wanted, max(self.safe(credit), self.conservative))

    def initial(self, history: tuple[float, ...] = ()) -> ControlState:
        """For a session nothing is known about, or one whose client has a history."""
        credit = self.credit(history)
        advice = self.predictor(credit, 0.0)
        threshold = self.threshold(self.excess_credit(history), credit, advice.omega)
        return ControlState(threshold, advice.window, credit, history=history[-self.memory :])

    def after(
        self, state: ControlState, expected_accepted: float, num_drafted: int
    ) -> ControlState:
        """After a window of `num_drafted` tokens with E[L_acc] = `expected_accepted`."""
        excess = _clip(expected_accepted / num_drafted, 0.0, 1.0) - self.neutral(num_drafted)
        before = self.excess_credit(state.history)
        drop = max(0.0, state.drop + before - excess - self.slack)
        alarmed = drop > self.alarm and before > 0.0
        history: tuple[float, ...] = (*state.history, excess)[-self.memory :]
        if alarmed:
            history, drop = (), 0.0
        credit = self.credit(history)
        delta = credit - state.credit
        advice = self.predictor(credit, delta)
        wanted = self.threshold(self.excess_credit(history), credit, advice.omega)
        moves = abs(wanted - state.threshold) >= self.band
        calm = state.held + 1 < self.hold
        if alarmed or (moves and not calm):
            threshold, held = wanted, 0
        else:
            threshold, held = state.threshold, state.held + 1
        return replace(
            state, threshold=threshold, window=advice.window, credit=credit, credit_delta=delta,
            version=state.version + 1, history=history, held=held, drop=drop,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class CreditPolicy:
    """The law as a policy of the controller.

    Attributes:
        realised: credit follows the tokens accepted under the current rule, which a relaxed
            threshold raises itself, instead of those expected without one; to compare.
    """

    law: CreditLaw
    realised: bool = False

    def initial(self, history: tuple[float, ...] = ()) -> ControlState:
        return self.law.initial(history)

    def after(self, state: ControlState, report: WindowReport) -> ControlState:
        accepted = report.num_accepted if self.realised else report.expected_accepted
        return self.law.after(state, accepted, report.num_drafted)


@dataclass(frozen=True, slots=True)
class ExplorePolicy:
    """Draws threshold and window anew after each window, evenly from a grid; credit as ever.

    The draw is a function of session and version, so a run can be repeated.
    """

    law: CreditLaw
    thresholds: tuple[float, ...]
    windows: tuple[int, ...]

    def initial(self, history: tuple[float, ...] = ()) -> ControlState:
        return self.law.initial(history)

    def after(self, state: ControlState, report: WindowReport) -> ControlState:
        state = self.law.after(state, report.expected_accepted, report.num_drafted)
        address = f"{report.session} {state.version}".encode()
        drawn = int.from_bytes(blake2b(address, digest_size=8).digest(), "big")
        which, rest = drawn % len(self.thresholds), drawn // len(self.thresholds)
        window = self.windows[rest % len(self.windows)]
        return replace(state, threshold=self.thresholds[which], window=window)


def _clip(value: float, least: float, most: float) -> float:
    return min(max(value, least), most)
