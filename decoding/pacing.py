"""What the edge measures of link, models and acceptance, and what it predicts from that.

    N = 1/(1 − a)         tokens to the next rollback, its correction included
    t(n) = α + β·n        a target pass over n tokens (least squares, old passes fade)
    R, q, c, g            round trip, wait for other sessions, draft step, gap between two jobs

Lockstep with windows of W tokens commits Σ_{i≤W} aⁱ tokens (the target's own included) a cycle:

    G(W) = (1 − a^(W+1))/(1 − a)  ÷  (W·c + g + R + q + t(W + 1))

Drafting ahead in messages of m tokens: the first is run at once, by a pass over m + 1. While a
pass is under way, s tokens are drafted, which the next pass takes in together: s·(c + g/m) = t(s),
less the half message that is still being written: s' = s − (m − 1)/2.
So the first bad token, number k with probability a^(k−1)·(1 − a), is found by the first pass, or by
the one after every s' tokens more; and where it stands first in its pass, the kept row rejects it
without one (pre-hit). A draft too slow for that has each message run as it comes. Together

    G(m) = N  ÷  (m·c + g + R + q + t(m + 1) + t(s)·a^(m+1)/(1 − a^s')),  or where that is less
           N  ÷  ((m·c + g)/(1 − a^m) + R + q + t(m + 1))

A target that runs on by itself writes a token a pass, t(1), from each rejection on, until the
draft, which learns of it a round trip later, has overtaken it after x tokens; from there on a token
takes what the draft takes. Of drafts that reach so far, a^x are still right. A token then takes

    T = t(1)·(1 − a^x) + (max(c + g/m, β) + β·s·(1 − a))·a^x
    x = ½ + (R + q + g)/(t(1) − c − g/m)

against t(1) of the target alone, with what passes take while nothing is drafted.

All of this is this project's choice [ours]; the ceiling of a single chain, N tokens per
N·c + R + t(1), is what both fall short of. `e2sci bench simulate` shows how near G comes to what
the state machines then do.

This module knows no clock and no session: times come in as numbers.
"""

from __future__ import annotations

import math

from msgspec import Struct
from msgspec.structs import replace

from decoding.rescue import Beliefs

MAX_MESSAGE = 4
"""Most tokens a message (docs/method.md, Progressive lookahead)."""
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
"""Weight that earlier feedback keeps at each judged token [ours]."""
PRIOR_ACCEPTANCE, PRIOR_WEIGHT = 0.7, 4.0
"""What is believed of a session before its first feedback, and for how many tokens it counts."""
RECALLED_WEIGHT = 16.0
"""For how many tokens the session before counts: the next text is another one [ours]."""
FORGET_PASS, FORGET_STEP = 1 / 2, 1 / 32
"""How much each pass in lockstep counts among those ahead, and moves the step ahead towards the
one alone [ours]: both forget within some 40 passes."""
RUN_SHARE = 0.5
"""Of the tokens far ahead, how many are run at all [ours]: in simulation 0.3 to 0.5 are alike, and
1 costs 2 % of the goodput."""
LEAST_ALONE = 3.0
"""Passes beside which nothing was drafted, before their time is believed [ours]."""
SURPRISE, SURPRISE_MS = 4.0, 5.0
"""A time counts for at most so many times what was expected, and so many ms more [ours]: a process
that was held for a second says nothing about link and models. A link that has become ten times
slower is believed after some ten answers."""
LEAST_CHANCE = 1e-3
"""Tokens accepted less probably are never drafted, even where verifying them is free [ours]."""
BRANCH_PRICE, LEAST_REACH = 0.5, 0.04
"""What a step of a branch costs, in draft steps, and the least chance of being reached, whatever it
may save [ours]."""
ETA_GAIN = 1 / 8
"""κ of `eta`."""
_SLOPE_WEIGHT = 4.0
_DOUBLING_TOKENS = 16.0


def believable(new_ms: float, expected_ms: float) -> float:
    """A measured time, no longer than `SURPRISE` allows."""
    return min(new_ms, SURPRISE * expected_ms + SURPRISE_MS)


def smoothed(old_ms: float | None, new_ms: float, gain: float = GAIN) -> float:
    """Exponential smoothing of times; the first sample counts in full."""
    return new_ms if old_ms is None else old_ms + (believable(new_ms, old_ms) - old_ms) * gain


def eta(share: float) -> float:
    """η_j = κ·(2·s_j − 1), s_j the accepted share of window j [ours].

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
        """With one more pass over `num_tokens` tokens, no longer than is `believable`."""
        if self.known:
            base_ms, per_token_ms = self.line()
            pass_ms = believable(pass_ms, base_ms + per_token_ms * num_tokens)
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
    """a: the chance that the next drafted token is accepted; older feedback fades."""

    accepted: float = PRIOR_ACCEPTANCE * PRIOR_WEIGHT
    judged: float = PRIOR_WEIGHT

    def judged_as(self, num_accepted: int, rejected: bool) -> Acceptance:
        """With `num_accepted` accepted tokens, and maybe one that was rejected."""
        fade = TOKEN_FADE ** (num_accepted + rejected)
        return Acceptance(
            self.accepted * fade + num_accepted, self.judged * fade + num_accepted + rejected
        )

    @property
    def rate(self) -> float:
        """In [0.02, 0.995]: a few tokens are no certainty."""
        return min(max(self.accepted / self.judged, 0.02), 0.995)

    def recalled(self) -> Acceptance:
        """As a belief about the next session: the same rate, at most `RECALLED_WEIGHT` tokens."""
        scale = min(1.0, RECALLED_WEIGHT / self.judged)
        return Acceptance(self.accepted * scale, self.judged * scale)


class Measures(Struct, frozen=True):
    """All that one session knows about link, models and acceptance.

    Attributes:
        alone: costs while the other model waits; `ahead`: while both run, which is slower where
            they share a machine.
        gap_ms: from one draft job to the next, besides drafting: hand-overs, sending.
        round_trips: the latest, in ms, without verification and queueing.
        rtt_ms: their smoothed value.
        queue_ms: smoothed wait at the cloud for other sessions.
        beliefs: how often the draft's first and second choices were right.
    """

    alone: Costs = Costs()
    ahead: Costs = Costs()
    acceptance: Acceptance = Acceptance()
    gap_ms: float | None = None
    round_trips: tuple[float, ...] = ()
    rtt_ms: float | None = None
    queue_ms: float = 0.0
    beliefs: Beliefs = Beliefs()

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
        bdp: tokens drafted in one round trip, wait and verification, the bandwidth-delay product.
        useful: the last token ahead that is worth verifying, see `useful_ahead`.
        rescue: the least chance of being reached at which a rescue branch is worth a draft step.
        drafting_ms, alone_ms: what a token takes of a target that runs on, with drafts and without;
            the second None before passes without drafts have been measured.
    """

    window: int
    lockstep: float
    message: int
    ahead: float
    bdp: float
    useful: int
    rescue: float
    drafting_ms: float
    alone_ms: float | None


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
    best = max(
        (plan_ahead(m, a, ahead, away_ms, gap_ms) for m in range(1, MAX_MESSAGE + 1)),
        key=lambda plan: plan.goodput,
    )
    # It waits for the pass under way, then for its own.
    at_cloud_ms = measures.queue_ms + 2.0 * ahead.pass_ms(best.waiting)
    return Forecast(
        window=window,
        lockstep=lockstep,
        message=best.message,
        ahead=best.goodput,
        bdp=(measures.path_ms + at_cloud_ms) / (ahead.step_ms + gap_ms / best.message),
        useful=best.useful,
        rescue=worth_rescuing(best, ahead, away_ms, gap_ms),
        drafting_ms=running_on_ms(best, a, ahead, away_ms, gap_ms),
        alone_ms=alone.pass_ms(1) if measures.alone.passes.weight >= LEAST_ALONE else None,
    )


def running_on_ms(plan: AheadPlan, a: float, costs: _Line, away_ms: float, gap_ms: float) -> float:
    """T, see the module's text: a token of a target that runs on while drafts come."""
    own_ms, draft_ms = costs.pass_ms(1), costs.step_ms + gap_ms / plan.message
    if draft_ms >= own_ms:
        return own_ms  # it never overtakes
    overtaking = 0.5 + (away_ms + gap_ms) / (own_ms - draft_ms)
    reach: float = a**overtaking
    led_ms = max(draft_ms, costs.per_token_ms) + costs.per_token_ms * plan.waiting * (1.0 - a)
    return own_ms * (1.0 - reach) + led_ms * reach


def worth_rescuing(plan: AheadPlan, costs: _Line, away_ms: float, gap_ms: float) -> float:
    """The least chance of being reached at which a branch is drafted.

    Where it is reached, the x tokens that the target would write by itself are verified instead:
    it saves x·(t(1) − c − g/m) ms. The edge has time for it, but a step beside a pass makes both
    slower where they share a machine: so the saving must be worth a part of the step [ours].
    """
    draft_ms = costs.step_ms + gap_ms / plan.message
    saved_ms = away_ms + gap_ms + max(0.0, costs.pass_ms(1) - draft_ms) / 2
    return min(max(BRANCH_PRICE * draft_ms / max(saved_ms, 1e-9), LEAST_REACH), 1.0)


def lockstep_goodput(window: int, a: float, costs: _Line, away_ms: float, gap_ms: float) -> float:
    """G(W), see the module's text."""
    tokens = (1.0 - a ** (window + 1)) / (1.0 - a)
    return tokens / (window * costs.step_ms + gap_ms + away_ms + costs.pass_ms(window + 1))


class AheadPlan(Struct, frozen=True):
    """Drafting ahead in messages of `message` tokens: G(m), s and the last useful token."""

    message: int
    goodput: float
    waiting: float
    useful: int


def plan_ahead(message: int, a: float, costs: _Line, away_ms: float, gap_ms: float) -> AheadPlan:
    """G(m), see the module's text. At most the useful tokens wait for a pass; which those are
    depends on G, so both are found in turns, which settle at once."""
    message_ms = message * costs.step_ms + gap_ms
    tokens = 1.0 / (1.0 - a)
    drafted_per_ms = message / message_ms
    spare = 1.0 - costs.per_token_ms * drafted_per_ms  # of the target, at the draft's speed
    coming = costs.base_ms * drafted_per_ms / spare if spare > 0.0 else math.inf
    waiting, goodput, useful = min(max(coming, message), tokens + 1.0), 0.0, 1
    first_ms = away_ms + costs.pass_ms(message + 1)
    one_by_one_ms = message_ms / (1.0 - a**message) + first_ms
    for _ in range(3):
        complete = max(waiting - (message - 1) / 2, message)
        later_ms = costs.pass_ms(waiting) * a ** (message + 1) / (1.0 - a**complete)
        goodput = tokens / max(message_ms + first_ms + later_ms, one_by_one_ms)
        useful = useful_ahead(a, costs.per_token_ms * goodput)
        waiting = max(min(coming, useful - message), float(message))
    return AheadPlan(message, goodput, waiting, useful)


def useful_ahead(a: float, price: float) -> int:
    """The last position ahead of the verified text that is worth drafting, at least 1.

    The n-th token ahead is accepted with probability aⁿ. Verifying it takes the target β, in which
    it yields β·G tokens otherwise: the `price`. About half of what is drafted so far ahead is never
    run, since a rejection makes it void before its pass begins. So n is the last with
    aⁿ ≥ ½·β·G [ours]. The draft's own time is no cost: it would wait.
    """
    chance = min(max(RUN_SHARE * price, LEAST_CHANCE), 0.9)
    return max(1, int(math.log(chance) / math.log(a)))
