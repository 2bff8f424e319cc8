"""Every interleaving of a small session in several paces (`tests.explorer`)."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from bus.protocol.bounds import SessionCoupling
from decoding import methods
from decoding.methods.base import Flow, Pace, PaceView
from decoding.sampling import SamplingParams
from tests.explorer import Explorer, explore
from tests.toy import ToyPair

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=11)
RESIDUAL = replace(SAMPLED, coupling=SessionCoupling.RESIDUAL)
CUT = SamplingParams(temperature=1.2, top_p=0.8, seed=7)
PAIR = ToyPair(vocab_size=3, agreement=0.6, seed=4, num_sparse=3)


class Steady:
    """`message` tokens a window, `budget` in flight."""

    name, forecasts = "steady", False

    def __init__(self, message: int, budget: int) -> None:
        self._flow = Flow(message, budget, awaits=False)

    def flow(self, view: PaceView) -> Flow:
        return self._flow


class Alternating:
    """Lockstep after a window that fell early, ahead after one that stood: both in one session."""

    name, forecasts = "alternating", False

    def flow(self, view: PaceView) -> Flow:
        if view.growth < 1.0:
            return Flow(1, 1, awaits=True)
        return Flow(message=1, budget=2, awaits=False)


CASES: list[
    tuple[Pace, int, SamplingParams, int, int]
] = [  # pace, the toy pair's seed, sampling, tokens, faults of the link or restarts
    (Steady(1, 3), 1, GREEDY, 4, 0),
    (Steady(1, 3), 3, SAMPLED, 4, 0),
    (Steady(2, 4), 1, GREEDY, 5, 0),
    (Steady(1, 2), 3, SAMPLED, 3, 1),
    (Alternating(), 1, GREEDY, 5, 0),
    (Alternating(), 3, SAMPLED, 5, 0),
    (Alternating(), 2, GREEDY, 3, 1),
    (Alternating(), 3, CUT, 5, 0),
    (Steady(1, 2), 3, CUT, 3, 1),
    (Steady(1, 3), 3, RESIDUAL, 4, 0),
    (Alternating(), 3, RESIDUAL, 5, 0),
]


def test_no_order_of_events_breaks_anything() -> None:
    """What holds is asserted in each world; here, that the worlds are not dull ones."""
    shared = prehits = rollbacks = worlds = 0
    for pace, seed, sampling, length, faults in CASES:
        pair = ToyPair(vocab_size=3, agreement=0.3, seed=seed, num_sparse=3)
        method = dataclasses.replace(methods.sd.METHOD, name="explored", pace=pace)
        explorer = Explorer(pair, sampling, method, length)
        worlds += explore(explorer, faults, limit=4_000)
        shared += explorer.shared_passes
        prehits += explorer.prehits
        rollbacks += explorer.rollbacks
    assert worlds > 3_000
    assert shared > 100
    assert prehits > 100
    assert rollbacks > 100
