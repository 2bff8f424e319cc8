"""Rescue branches, simulated: what is counted, and closed forms of small answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.simulate.choices import Belief, belief, drawn, recorded_choices
from bench.simulate.device import Device
from bench.simulate.gains import gain
from bench.simulate.rescue import Policy, Rescued, RescueSession
from bench.simulate.run import rescue_gains
from bus.protocol.errors import ConfigurationError
from engines.second_choices import OTHER, Choice
from engines.torch.oracle import RecordedAnswer, write_answers
from tests.engines.tiny import save_tiny

DEVICE = Device(step_ms=10.0, pass_ms=100.0, pass_token_ms=0.0)
SURE, UNSURE = Choice(0, 0.9), Choice(1, 0.1)
KNOWS = Belief((0.5,), ((0.3, 0.6), (0.95, 0.02)))
CHAIN, BRANCHES = Policy(), Policy(weight=1.0)


def session(
    choices: list[Choice], policy: Policy, rtt_ms: float = 40.0, device: Device = DEVICE
) -> Rescued:
    return RescueSession(choices, KNOWS, policy, rtt_ms, device).run()


def test_a_right_draft_is_as_fast_as_its_steps() -> None:
    ran = session([SURE] * 400, CHAIN)
    assert ran.tokens_per_s == pytest.approx(100.0, rel=0.12)
    assert (ran.rejections, ran.rescues, ran.branch_nodes) == (0, 0, 0)


def test_a_draft_that_is_never_right_leaves_the_target_alone() -> None:
    ran = session([Choice(OTHER, 0.9)] * 100, CHAIN)
    assert ran.tokens_per_s == pytest.approx(10.0)


def test_a_second_choice_that_was_seen_coming_saves_the_round_trip() -> None:
    text = ([SURE] * 9 + [UNSURE]) * 40
    chain, branches = session(text, CHAIN), session(text, BRANCHES)
    assert branches.tokens_per_s > 1.3 * chain.tokens_per_s
    assert chain.rescues == 0
    assert branches.rescues > 10
    assert branches.branch_nodes > 0


def test_branches_after_tokens_that_were_right_only_cost() -> None:
    text = [Choice(0, 0.1)] * 300
    deep = (Policy(weight=weight, least=1e-4) for weight in (0.0, 1.0))
    chain, branches = (session(text, policy) for policy in deep)
    assert branches.tokens_per_s < chain.tokens_per_s


def test_a_branch_is_no_longer_than_the_policy_has_it() -> None:
    """The draft waits rather than go on with it; so it has less to do."""
    text = [Choice(OTHER, 0.1)] * 60
    long, short = (
        session(text, Policy(weight=1.0, longest=longest, least=0.1)) for longest in (8, 1)
    )
    assert 0 < short.branch_nodes < long.branch_nodes


def test_a_wide_step_runs_several_nodes() -> None:
    text = ([SURE] * 4 + [UNSURE]) * 60
    slow = Device(step_ms=30.0, pass_ms=100.0)
    narrow, wide = (session(text, Policy(weight=1.0, width=width), device=slow) for width in (1, 4))
    assert wide.tokens_per_s > narrow.tokens_per_s


def test_a_pass_over_the_whole_tree_is_no_slower() -> None:
    text = ([SURE] * 4 + [UNSURE]) * 60
    path, tree = (session(text, Policy(weight=0.5, width=4, tree=tree)) for tree in (False, True))
    assert tree.tokens_per_s >= path.tokens_per_s


def test_a_belief_is_what_was_counted() -> None:
    choices = [Choice(0, 0.9)] * 600 + ([Choice(0, 0.1)] + [Choice(1, 0.1)] * 2) * 200
    known = belief(choices)
    assert known(0.95)[0] == pytest.approx(1.0, abs=0.03)
    assert known(0.05) == pytest.approx((1 / 3, 2 / 3), abs=0.03)


def test_tokens_are_drawn_at_the_rate_that_is_asked_for() -> None:
    found = [drawn([SURE, UNSURE], 0.25, 4000, seed) for seed in range(10)]
    wrong = sum(choice.rank for answer in found for choice in answer)
    assert wrong == pytest.approx(10_000, rel=0.04)
    assert found[1] == drawn([SURE, UNSURE], 0.25, 4000, 1) != found[2]


def test_choices_are_read_off_the_drafts_rows(tmp_path: Path) -> None:
    """A token that is not the first choice is another choice, and takes no part in the margin."""
    spec = str(save_tiny(tmp_path / "draft"))
    prompt = (5, 17, 99)
    answers = [RecordedAnswer(prompt, (token,)) for token in range(290)]
    found = [choice for (choice,) in recorded_choices(spec, answers)]
    assert sorted(choice.rank for choice in found)[:3] == [0, 1, OTHER]
    assert len({choice.margin for choice in found}) == 1
    assert 0.0 <= found[0].margin <= 1.0


def test_gains_say_what_they_are_of(tmp_path: Path) -> None:
    choices = [SURE] * 60 + [UNSURE] * 20 + [Choice(OTHER, 0.2)] * 5
    found = gain(choices, 0.3, 80.0, DEVICE, 300, seed=0)
    assert found.source == "simulated"
    assert found.branches > 1.05 * found.chain
    assert found.batched > found.chain
    assert 0 < found.on_branches < 1
    answers = tmp_path / "answers.jsonl"
    write_answers(answers, [RecordedAnswer((5, 17), (3, 4))])
    spec = str(save_tiny(tmp_path / "draft"))
    with pytest.raises(ConfigurationError, match="some of both are needed"):
        rescue_gains(DEVICE, [40.0], [0.1], answers, spec, 50, 0, as_json=True)
