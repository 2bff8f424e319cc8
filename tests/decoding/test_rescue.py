"""Second choices: which they are, how likely, and what the edge makes of them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from msgspec.structs import replace

from decoding.coupling import best_two, choose_sparse, noise_at
from decoding.edge_events import Crop, Draft, Send
from decoding.methods.base import Flow, PaceView
from decoding.prefix_hash import chain, prompt_hash
from decoding.rescue import BORDERS, CERTAIN, FADE, PRIOR, PRIOR_WEIGHT, Beliefs, Doubt, doubts
from decoding.sampling import SamplingParams, SparseDistribution
from tests.decoding.edge_session import (
    AHEAD,
    PROMPT,
    RESIDUAL,
    UNKNOWN,
    Edge,
    drafted,
    running,
    says,
    sent,
)

GREEDY, SAMPLED = SamplingParams(), SamplingParams(temperature=0.8, seed=5)
IDS = np.array([[7, 3, 9], [4, 8, 2]], np.int32)
PROBS = np.array([[0.5, 0.25, 0.125], [1.0, 0.0, 0.0]], np.float16)
SECOND = 0
"""The second choice in the rows of `drafted`, by a margin of a half."""


def test_at_temperature_0_the_second_is_the_second_most_probable() -> None:
    assert doubts(IDS, PROBS, GREEDY, 10) == (Doubt(3, 0.25), CERTAIN)


def test_above_it_the_second_is_what_the_seed_would_choose_without_the_first() -> None:
    q = SparseDistribution(np.array([7, 3, 9], np.int32), np.array([0.5, 0.3, 0.2]))
    for position in range(40):
        second, lead = best_two(q, 5, position)
        first = choose_sparse(q, 5, position)
        keep = q.ids != first
        rest = SparseDistribution(q.ids[keep], q.probs[keep])
        assert second == choose_sparse(rest, 5, position)
        scores = np.log(q.probs) - np.log(-np.log(noise_at(5, position, q.ids)))
        assert lead == pytest.approx(float(np.sort(scores)[-1] - np.sort(scores)[-2]))


def test_the_margin_of_scores_is_within_0_and_1() -> None:
    (doubt, certain) = doubts(IDS, PROBS, SAMPLED, 10)
    assert doubt.second in {7, 3, 9}
    assert 0.0 < doubt.margin < 1.0
    assert certain == CERTAIN


def test_one_possible_token_leaves_no_second() -> None:
    q = SparseDistribution(np.array([7], np.int32), np.array([1.0]))
    assert best_two(q, 5, 10) == (None, math.inf)


def test_beliefs_are_what_was_counted_and_fade() -> None:
    doubt = Doubt(3, 0.2)
    known = Beliefs().seen([(doubt, 0), (doubt, 1), (doubt, 1), (doubt, 2)])
    first, second = PRIOR[1]
    counts = [PRIOR_WEIGHT * first, PRIOR_WEIGHT * second, PRIOR_WEIGHT * (1 - first - second)]
    for rank in (0, 1, 1, 2):
        counts = [FADE * count for count in counts]
        counts[rank] += 1
    total = sum(counts)
    assert known.rates(doubt) == pytest.approx((counts[0] / total, counts[1] / total))
    assert known.rates(Doubt(3, 0.5)) == Beliefs().rates(Doubt(3, 0.5))
    assert known.rates(Doubt(None, 0.2))[1] == 0.0


def test_the_prior_has_a_bin_between_each_two_borders_and_grows_surer() -> None:
    assert len(PRIOR) == len(BORDERS) + 1
    firsts = [first for first, _ in PRIOR[:-1]]
    assert firsts == sorted(firsts)
    assert all(first + second <= 1.0 for first, second in PRIOR)


# --- at the edge ------------------------------------------------------------------------------


class Branching:
    """One token a message, two on the chain, and whatever branch is likelier than 0.1."""

    name, forecasts = "branching", False

    def flow(self, view: PaceView) -> Flow:
        return Flow(message=1, budget=2, awaits=False, rescue=0.1)


SPEC = replace(AHEAD, method=dataclasses.replace(AHEAD.method, pace=Branching(), runs_on=True))
CHAIN = (10, 11)


def hash_of(*tokens: int) -> bytes:
    return list(chain(prompt_hash(PROMPT), tokens))[-1]


def at_the_budget() -> Edge:
    """Two tokens are drafted: nothing is left but branches."""
    edge = running(SPEC)
    return edge.is_told(drafted(1, 3, CHAIN[:1]), drafted(2, 4, CHAIN[1:]))


def with_a_branch() -> Edge:
    """The branch after the second choice of the first token has been sent."""
    return at_the_budget().is_told(drafted(3, 4, (20,)))


def test_with_the_chain_at_its_budget_the_likeliest_branch_is_drafted() -> None:
    edge = at_the_budget()
    assert edge.effects[-2:] == (Crop(3), Draft(3, (SECOND,), 1))
    assert edge.state.num_cached == 3


def test_a_branch_is_sent_with_its_second_choice_and_named_one() -> None:
    edge = with_a_branch()
    sends = [effect for effect in edge.effects if isinstance(effect, Send)]
    assert sends == [sent((SECOND, 20), start=3, number=3, branch=True)]
    assert edge.effects[0] == Crop(3), "the draft's cache is the chain's again"


def test_text_that_turns_to_a_branch_finds_it_there() -> None:
    edge = with_a_branch()
    before = edge.state.last_number
    effects = edge.tell(says(3, (SECOND,)))
    assert edge.state.drafted == (20,)
    assert [flight.start for flight in edge.state.in_flight] == [4]
    assert edge.state.in_flight[0].follows == hash_of(SECOND)
    assert edge.state.last_number == before, "nothing is sent again"
    assert next(e for e in effects if isinstance(e, Draft)).feed == (SECOND, 20)
    edge.tell(says(4, (20, 30)))
    assert edge.state.tokens == (*PROMPT, SECOND, 20, 30)


def test_text_beyond_the_fork_in_the_same_feedback_is_judged_by_the_branch() -> None:
    edge = with_a_branch()
    edge.tell(says(3, (SECOND, 20, 30)))
    assert edge.state.tokens == (*PROMPT, SECOND, 20, 30)
    assert edge.state.measures.acceptance.accepted > 2.0


def test_a_branch_that_is_being_drafted_goes_on_as_the_chain() -> None:
    edge = at_the_budget()
    effects = edge.tell(says(3, (SECOND,)))
    assert not any(isinstance(effect, Crop | Draft) for effect in effects)
    edge.tell(drafted(3, 4, (20,)))
    assert edge.state.drafted == (20,)
    assert edge.state.num_cached == 4
    assert sent((20,), after=(*PROMPT, SECOND), start=4, number=3, acknowledged=4) in edge.effects


def test_where_the_text_goes_elsewhere_branches_are_dropped() -> None:
    edge = with_a_branch()
    edge.tell(says(3, (66,)))
    assert not edge.state.branches
    assert not edge.state.drafted
    assert edge.state.num_cached == 3


def test_where_the_text_follows_the_chain_a_branch_is_passed() -> None:
    edge = with_a_branch()
    edge.tell(says(3, CHAIN[:1]))
    assert [branch.start for branch in edge.state.branches] == []
    assert edge.state.drafted == CHAIN[1:]


def test_a_draft_of_a_branch_that_the_text_has_passed_is_nothing() -> None:
    edge = at_the_budget().is_told(says(3, CHAIN))
    state = edge.state
    edge.tell(drafted(3, 4, (20,)))
    assert edge.state.branches == ()
    assert edge.state.tokens == state.tokens
    assert edge.state.num_cached == 3


def test_a_session_that_is_opened_again_begins_without_branches() -> None:
    edge = with_a_branch()
    edge.tell(UNKNOWN)
    assert not edge.state.branches
    assert [flight.tokens for flight in edge.state.in_flight] == [CHAIN[:1], CHAIN[1:]]


def test_windows_with_rows_have_no_branches() -> None:
    spec = replace(SPEC, sampling=RESIDUAL.sampling)
    edge = running(spec).is_told(drafted(1, 3, CHAIN[:1]))
    edge.tell(drafted(2, 4, CHAIN[1:]))
    assert edge.state.job is None
