"""Every interleaving of a small session in several paces (`tests.explorer`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import pytest

from bus.protocol.bounds import SessionCoupling
from decoding import methods
from decoding.methods.base import Flow, Pace, PaceView
from decoding.methods.paces import Continuous
from decoding.sampling import SamplingParams
from tests.explorer import Explorer, explore
from tests.harness import Steady
from tests.toy import ToyPair

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=11)
RESIDUAL = replace(SAMPLED, coupling=SessionCoupling.RESIDUAL)
CUT = SamplingParams(temperature=1.2, top_p=0.8, seed=7)
PAIR = ToyPair(vocab_size=3, agreement=0.6, seed=4, num_sparse=3)


class Alternating:
    """Lockstep after a window that fell early, ahead after one that stood: both in one session."""

    name, forecasts = "alternating", False

    def flow(self, view: PaceView) -> Flow:
        if view.growth < 1.0:
            return Flow(1, 1, awaits=True)
        return Flow(message=1, budget=2, awaits=False)


@dataclass(frozen=True)
class Case:
    """A small session.

    Attributes:
        seed: of the toy pair. length: tokens of the answer. faults: of the link, or restarts.
        lease: with one, the target writes by itself. drafts: else there is no draft.
        ordered: the link keeps the order of messages.
    """

    pace: Pace
    seed: int
    sampling: SamplingParams
    length: int
    faults: int = 0
    lease: int | None = None
    drafts: bool = True
    ordered: bool = False

    def explorer(self) -> Explorer:
        pair = ToyPair(vocab_size=3, agreement=0.3, seed=self.seed, num_sparse=3)
        method = replace(
            methods.sd.METHOD, name="explored", pace=self.pace, runs_on=self.lease is not None
        )
        return Explorer(
            pair, self.sampling, method, self.length, self.lease or 256, self.drafts, self.ordered
        )


WAITS = (
    Case(Steady(1, 3), 1, GREEDY, 4),
    Case(Steady(1, 3), 3, SAMPLED, 4),
    Case(Steady(2, 4), 1, GREEDY, 5),
    Case(Steady(1, 2), 3, SAMPLED, 3, faults=1),
    Case(Alternating(), 1, GREEDY, 5),
    Case(Alternating(), 3, SAMPLED, 5),
    Case(Alternating(), 2, GREEDY, 3, faults=1),
    Case(Alternating(), 3, CUT, 5),
    Case(Steady(1, 2), 3, CUT, 3, faults=1),
    Case(Continuous(), 1, GREEDY, 4),
    Case(Continuous(), 3, SAMPLED, 3, faults=1),
    Case(Steady(1, 3), 3, RESIDUAL, 4),
    Case(Alternating(), 3, RESIDUAL, 5),
)
RUNS_ON = (
    Case(Steady(1, 2), 1, GREEDY, 3, lease=1),
    Case(Steady(1, 2), 1, GREEDY, 3, lease=2),
    Case(Steady(1, 2), 3, SAMPLED, 3, faults=1, lease=1),
    Case(Steady(2, 3), 3, CUT, 3, lease=2),
    Case(Steady(1, 2), 3, CUT, 3, lease=2, drafts=False),
    Case(Steady(1, 2), 3, CUT, 3, faults=1, lease=1, drafts=False),
    Case(Steady(1, 3), 3, RESIDUAL, 3, lease=1),
)


@dataclass
class Seen:
    """What a series of sessions has gone through, added up."""

    worlds: int = 0
    shared_passes: int = 0
    prehits: int = 0
    rollbacks: int = 0
    own_passes: int = 0
    late: int = 0
    branches: int = 0
    rescued: int = 0

    def add(self, case: Case, limit: int) -> None:
        explorer = case.explorer()
        self.worlds += explore(explorer, case.faults, limit)
        for name in fields(self)[1:]:
            count = getattr(self, name.name) + getattr(explorer, name.name)
            setattr(self, name.name, count)


def seen(cases: Sequence[Case], limit: int) -> Seen:
    found = Seen()
    for case in cases:
        found.add(case, limit)
    print(found)
    return found


def test_no_order_of_events_breaks_a_session_whose_target_waits() -> None:
    """What holds is asserted in each world; here, that the worlds are not dull ones."""
    found = seen(WAITS, limit=4_000)
    assert found.worlds > 3_000
    assert found.shared_passes > 100
    assert found.prehits > 10
    assert found.rollbacks > 100


def test_nor_one_whose_target_goes_on_over_a_link_in_order() -> None:
    cases = tuple(replace(case, ordered=True) for case in RUNS_ON)
    cases += (
        Case(Steady(1, 3), 1, GREEDY, 4, faults=1, lease=2, ordered=True),
        Case(Alternating(), 1, GREEDY, 4, lease=3, ordered=True),
    )
    found = seen(cases, limit=12_000)
    assert found.worlds > 5_000
    assert found.own_passes > 500
    assert found.late > 500
    assert found.rollbacks > 100


@pytest.mark.parametrize(
    "cases",
    [
        [case for case in RUNS_ON if not (case.faults and case.drafts)],
        pytest.param(RUNS_ON, marks=pytest.mark.long),
    ],
)
def test_nor_over_one_that_reorders(cases: Sequence[Case]) -> None:
    found = seen(cases, limit=12_000)
    assert found.worlds > 5_000
    assert found.own_passes > 300
    assert found.late > 3_000
    assert found.shared_passes > 20


BRANCHES = (
    Case(Steady(1, 2, 0.05), 1, GREEDY, 3, lease=1),
    Case(Steady(1, 2, 0.05), 3, CUT, 3, lease=2, ordered=True),
    Case(Steady(1, 3, 0.05), 3, SAMPLED, 4, lease=2, ordered=True),
    Case(Steady(1, 2, 0.05), 1, GREEDY, 3, faults=1, lease=1, ordered=True),
    Case(Steady(1, 2, 0.05), 3, CUT, 3, faults=1, lease=2, ordered=True),
)


def test_nor_one_with_branches() -> None:
    found = seen(BRANCHES, limit=12_000)
    assert found.worlds > 5_000
    assert found.branches > 1_000
    assert found.rescued > 300
