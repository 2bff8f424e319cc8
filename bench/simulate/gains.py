"""What rescue branches gain over a single chain: the best of some policies, on tokens that none of
them was chosen by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.simulate.choices import belief, drawn
from bench.simulate.device import Device
from bench.simulate.rescue import Policy, Rescued, RescueSession
from engines.second_choices import Choice

_LEASTS = (0.01, 0.03, 0.08)
CHAINS = tuple(Policy(least=least) for least in _LEASTS)
BRANCHES = tuple(
    Policy(weight, longest, least)
    for weight, longest, least in itertools.product((0.7, 1.0, 2.0), (3, 64), _LEASTS[1:])
)
BATCH = 4
"""Nodes of a draft step where branches cost the draft no time."""
_BELIEF_TOKENS = 8000


@dataclass(frozen=True, slots=True)
class Gain:
    """At one error rate over one link; tokens a second, simulated.

    Attributes:
        chain: of the best single chain. branches: with a step for each token of a branch, `policy`
            the best one; `batched`: where one step runs `BATCH` of them. tree: as branches, all of
            them verified in one pass.
        on_branches: share of the draft's steps. rescued: of the rejections.
    """

    error_rate: float
    rtt_ms: float
    chain: float
    branches: float
    batched: float
    tree: float
    policy: Policy
    on_branches: float
    rescued: float
    source: str = "simulated"


def gain(
    choices: Sequence[Choice], error_rate: float, rtt_ms: float, device: Device, num_tokens: int,
    seed: int,
) -> Gain:  # fmt: skip
    """Of recorded choices, drawn anew: the edge's belief, the choice of a policy and the figures
    are of different draws."""
    known = belief(drawn(choices, error_rate, _BELIEF_TOKENS, seed))
    tried = drawn(choices, error_rate, num_tokens, seed + 1)
    scored = drawn(choices, error_rate, 2 * num_tokens, seed + 2)

    def run(policy: Policy, tokens: Sequence[Choice]) -> Rescued:
        return RescueSession(tokens, known, policy, rtt_ms, device).run()

    def best(policies: Sequence[Policy]) -> Policy:
        return max(policies, key=lambda policy: run(policy, tried).tokens_per_s)

    chain, policy = best(CHAINS), best(BRANCHES)
    found = run(policy, scored)
    return Gain(
        error_rate, rtt_ms, run(chain, scored).tokens_per_s, found.tokens_per_s,
        run(replace(policy, width=BATCH), scored).tokens_per_s,
        run(replace(policy, tree=True), scored).tokens_per_s,
        policy, found.branch_nodes / max(found.steps, 1), found.rescues / max(found.rejections, 1),
    )  # fmt: skip
