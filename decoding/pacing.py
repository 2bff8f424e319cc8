"""What the edge measures of link, models and acceptance, and what it predicts from that.

    N = 1/(1 − a)         tokens to the next rollback, its correction included
    t(n) = α + β·n        a target pass over n tokens (least squares, old passes fade)
    R, q, c, g            round trip, wait behind other sessions, draft step, gap between two jobs

Lockstep with windows of W tokens commits Σ_{i≤W} aⁱ tokens (the bonus token included) a cycle:

    G(W) = (1 − a^(W+1))/(1 − a)  ÷  (W·c + g + R + q + t(W + 1))

Drafting ahead in messages of m tokens ends with the first message that holds a bad token, which
is number 1/(1 − a^m) on average. If it is the first of all, the cloud is idle and runs it at once.
Else it waits for half of the pass under way, and is run, unless the bad token stands first in
its pass, where the kept row rejects it without one (pre-hit):

    G(m) = N  ÷  ((m·c + g)/(1 − a^m) + R + q + (1 − a^m)·t(m + 1) + a^m·(½ + 1 − 1/n)·t(n))

n is the number of tokens a pass finds waiting: those drafted during the pass before, n = t(n)·m
÷ (m·c + g), at most what an epoch has, N + 1. All of this is this project's choice [ours]; the
ceiling of a single chain, N tokens per N·c + R + t(1), is what both fall short of.

This module knows no clock and no session: times come in as numbers.
"""

from __future__ import annotations

import math

from msgspec import Struct
from msgspec.structs import replace

MAX_MESSAGE = 4
"""Most tokens a message (PAPER.md §4)."""
MAX_LOCKSTEP_WINDOW = 32
"""Longest window that is considered when falling back to lockstep [ours]."""
PATH_SAMPLES = 8
"""Round trips over which the path's minimum is taken [ours]: a few hundred ms to a few seconds,
so that a link that has become slower is believed after as many answers."""
GAIN = 1 / 8
"""Of smoothed times, as RFC 6298's."""
PASS_FADE = 0.95
"""Weight that earlier passes keep at each new one [ours]."""
TOKEN_FADE = 63 / 64
"""Weight that earlier verdicts keep at each judged token [ours]."""
PRIOR_ACCEPTANCE, PRIOR_WEIGHT = 0.7, 4.0
"""What is believed of a session before its first verdicts, and for how many tokens it counts."""
FORGET_PASS, FORGET_STEP = 1 / 2, 1 / 32
"""How much each pass in lockstep counts among those ahead, and moves the step ahead towards the
one alone [ours]: both forget within some 40 passes."""
ETA_GAIN = 1 / 8
"""κ of `eta`."""
_SLOPE_WEIGHT = 4.0
_DOUBLING_TOKENS = 16.0


def smoothed(old: float | None, new: float, gain: float = GAIN) -> float:
    """Exponential smoothing; the first sample counts in full."""
    return new if old is None else old + (new - old) * gain


def eta(share: float) -> float:
    """η_j = κ·(2·s_j − 1), s_j the accepted share of window j (PAPER.md §4 leaves it open) [ours].

    A window accepted in full lets the budget grow by κ = 1/8, one rejected at its first token
    lowers it by as much.
    """
    return ETA_GAIN * (2.0 * share - 1.0)


class PassTimes(Struct, frozen=True):
    """t(n) = α + β·n, fitted to measured passes; sums over passes whose weights fade.

    Where all passes had the same length, β is taken from a weak belief: a pass over 16 tokens
    takes twice the time of an empty one.
    """

    weight: float = 0.0
    tokens: float = 0.0
    millis: float = 0.0
    tokens_squared: float = 0.0
    product: float = 0.0

    @property
    def known(self) -> bool:
        return self.weight > 0.0

    def sample(self, num_tokens: int, pass_ms: float, weight: float = 1.0) -> PassTimes:
        """With one more pass over `num_tokens` tokens."""
        fade = 1.0 - (1.0 - PASS_FADE) * weight
        return PassTimes(
            self.weight * fade + weight,
            self.tokens * fade + weight * num_tokens,
            self.millis * fade + weight * pass_ms,
            self.tokens_squared * fade + weight * num_tokens * num_tokens,
            self.product * fade + weight * num_tokens * pass_ms,
        )

    def line(self) -> tuple[float, float]:
        """(α, β) in ms and ms/token, both at least 0."""
        mean_n, mean_t = self.tokens / self.weight, self.millis / self.weight
        variance = self.tokens_squared / self.weight - mean_n * mean_n
        covariance = self.product / self.weight - mean_n * mean_t
        belief = mean_t / (mean_n + _DOUBLING_TOKENS)
        pull = _SLOPE_WEIGHT / (self.weight + 1.0)
        slope = (covariance + pull * belief) / (max(variance, 0.0) + pull)
        slope = min(max(slope, 0.0), mean_t / max(mean_n, 1.0))
        return mean_t - slope * mean_n, slope


class Costs(Struct, frozen=True):
    """Time of a draft step and of target passes."""

    step_ms: float | None = None
    passes: PassTimes = PassTimes()


class Acceptance(Struct, frozen=True):
    """a: the chance that the next drafted token stands, over verdicts that fade."""

    accepted: float = PRIOR_ACCEPTANCE * PRIOR_WEIGHT
    judged: float = PRIOR_WEIGHT

    def verdict(self, num_accepted: int, rejected: bool) -> Acceptance:
        """With `num_accepted` tokens that stood, and maybe one that did not."""
        fade = TOKEN_FADE ** (num_accepted + rejected)
        return Acceptance(
            self.accepted * fade + num_accepted, self.judged * fade + num_accepted + rejected
        )

    @property
    def rate(self) -> float:
        """In [0.02, 0.995]: a few verdicts are no certainty."""
        return min(max(self.accepted / self.judged, 0.02), 0.995)

    def recalled(self) -> Acceptance:
        """As a belief about the next session: the same rate, as light as the prior."""
        scale = PRIOR_WEIGHT / self.judged
        return Acceptance(self.accepted * scale, self.judged * scale)


class Measures(Struct, frozen=True):
    """All that one session knows about link, models and acceptance.

    Attributes:
        alone: costs while the other model waits; `ahead`: while both run, which is slower where
            they share a machine.
        gap_ms: from one draft job to the next, besides drafting: hand-overs, sending.
        round_trips: the latest, in ms, without verification and queueing.
        rtt_ms: their smoothed value.
        queue_ms: smoothed wait at the cloud behind other sessions.
        delay_ms: smoothed time a window spends at the cloud, its own session's passes included.
    """

    alone: Costs = Costs()
    ahead: Costs = Costs()
    acceptance: Acceptance = Acceptance()
    gap_ms: float | None = None
    round_trips: tuple[float, ...] = ()
    rtt_ms: float | None = None
    queue_ms: float = 0.0
    delay_ms: float | None = None

    def drafted(self, num_tokens: int, draft_ms: float, gap_ms: float, alone: bool) -> Measures:
        """With one more draft job of at least one token."""
        costs = self.alone if alone else self.ahead
        costs = replace(costs, step_ms=smoothed(costs.step_ms, draft_ms / num_tokens))
        gap_ms = smoothed(self.gap_ms, max(0.0, gap_ms))
        if alone:
            return replace(self, alone=costs, gap_ms=gap_ms)
        return replace(self, ahead=costs, gap_ms=gap_ms)

    def passed(self, num_tokens: int, pass_ms: float, alone: bool) -> Measures:
        """With one more target pass.

        What was learnt about drafting ahead is slowly forgotten in lockstep, so that it is tried
        again: each pass alone pulls it a little towards what passes cost alone.
        """
        if not alone:
            passes = self.ahead.passes.sample(num_tokens, pass_ms)
            return replace(self, ahead=replace(self.ahead, passes=passes))
        measures = replace(
            self, alone=replace(self.alone, passes=self.alone.passes.sample(num_tokens, pass_ms))
        )
        if not self.ahead.passes.known:
            return measures
        passes = self.ahead.passes.sample(num_tokens, pass_ms, weight=FORGET_PASS)
        step_ms = self.ahead.step_ms
        if step_ms is not None and self.alone.step_ms is not None:
            step_ms = smoothed(step_ms, self.alone.step_ms, gain=FORGET_STEP)
        return replace(measures, ahead=Costs(step_ms, passes))

    def answered(self, rtt_ms: float) -> Measures:
        """With one more round trip."""
        return replace(
            self,
            round_trips=(*self.round_trips, rtt_ms)[-PATH_SAMPLES:],
            rtt_ms=smoothed(self.rtt_ms, rtt_ms),
        )

    def waited(self, delay_ms: float) -> Measures:
        """With one more window's time at the cloud."""
        return replace(self, delay_ms=smoothed(self.delay_ms, delay_ms))

    def queued(self, others_ms: float) -> Measures:
        """With one more pass that waited so long for other sessions."""
        return replace(self, queue_ms=smoothed(self.queue_ms, others_ms))

    @property
    def path_ms(self) -> float:
        """The shortest of the latest round trips: what the path takes without a queue on it."""
        return min(self.round_trips)

    @property
    def known(self) -> bool:
        """Whether everything a prediction needs has been measured at least once."""
        return (
            (self.alone.step_ms or self.ahead.step_ms) is not None
            and (self.alone.passes.known or self.ahead.passes.known)
            and self.rtt_ms is not None
        )


class Forecast(Struct, frozen=True):
    """What the measures promise; goodput in committed tokens per ms.

    Attributes:
        window: W of the fastest lockstep, `lockstep` its goodput.
        message: m of the fastest drafting ahead, `ahead` its goodput.
        bdp: tokens drafted in one round trip and verification, the bandwidth-delay product.
        useful: n-th token ahead from which on drafting can only lose, see `useful_ahead`.
    """

    window: int
    lockstep: float
    message: int
    ahead: float
    bdp: float
    useful: int


class _Line(Struct, frozen=True):
    """Costs as numbers: c, α and β."""

    step_ms: float
    base_ms: float
    per_token_ms: float

    def pass_ms(self, num_tokens: float) -> float:
        return self.base_ms + self.per_token_ms * num_tokens


def _line(costs: Costs, others: Costs) -> _Line:
    """`costs`, with what they lack taken from the `others`."""
    step_ms = others.step_ms if costs.step_ms is None else costs.step_ms
    passes = costs.passes if costs.passes.known else others.passes
    assert step_ms is not None
    return _Line(max(step_ms, 1e-3), *passes.line())


def forecast(measures: Measures) -> Forecast | None:
    """What lockstep and drafting ahead would yield now; None before all has been measured."""
    if not measures.known:
        return None
    assert measures.rtt_ms is not None
    alone = _line(measures.alone, measures.ahead)
    ahead = _line(measures.ahead, measures.alone)
    away_ms, gap_ms = measures.rtt_ms + measures.queue_ms, measures.gap_ms or 0.0
    a = measures.acceptance.rate
    lockstep, window = lockstep_goodput(1, a, alone, away_ms, gap_ms), 1
    for w in range(2, MAX_LOCKSTEP_WINDOW + 1):
        goodput = lockstep_goodput(w, a, alone, away_ms, gap_ms)
        if goodput <= lockstep:
            break  # G(W), a concave count over a linear time, has one maximum
        lockstep, window = goodput, w
    fastest, message = max(
        (ahead_goodput(m, a, ahead, away_ms, gap_ms), m) for m in range(1, MAX_MESSAGE + 1)
    )
    delay_ms = ahead.pass_ms(1.0) if measures.delay_ms is None else measures.delay_ms
    per_token_ms = ahead.step_ms + gap_ms / message
    return Forecast(
        window=window,
        lockstep=lockstep,
        message=message,
        ahead=fastest,
        bdp=(measures.path_ms + delay_ms) / per_token_ms,
        useful=useful_ahead(a),
    )


def lockstep_goodput(window: int, a: float, costs: _Line, away_ms: float, gap_ms: float) -> float:
    """G(W), see the module's text."""
    tokens = (1.0 - a ** (window + 1)) / (1.0 - a)
    return tokens / (window * costs.step_ms + gap_ms + away_ms + costs.pass_ms(window + 1))


def ahead_goodput(message: int, a: float, costs: _Line, away_ms: float, gap_ms: float) -> float:
    """G(m), see the module's text."""
    message_ms = message * costs.step_ms + gap_ms
    tokens = 1.0 / (1.0 - a)
    drafted_per_ms = message / message_ms
    spare = 1.0 - costs.per_token_ms * drafted_per_ms  # of the target, at the draft's speed
    waiting = costs.base_ms * drafted_per_ms / spare if spare > 0.0 else math.inf
    waiting = min(max(waiting, float(message)), tokens + 1.0)
    later = a**message
    verifying_ms = (1.0 - later) * costs.pass_ms(message + 1) + later * (
        1.5 - 1.0 / waiting
    ) * costs.pass_ms(waiting)
    return tokens / (message_ms / (1.0 - later) + away_ms + verifying_ms)


def useful_ahead(a: float) -> int:
    """The last position ahead of the verified text that is worth drafting, at least 1.

    The n-th token ahead stands with probability aⁿ and then has saved its step c. While it is
    drafted a rollback may arrive (one token is judged for each one drafted, and falls with
    probability 1 − a), which then waits for c/2 on average until the draft is interrupted. So
    the gain is aⁿ·c − (1 − a)·c/2, and nil at n = ln((1 − a)/2)/ln a [ours].
    """
    return max(1, int(math.log((1.0 - a) / 2.0) / math.log(a)))
