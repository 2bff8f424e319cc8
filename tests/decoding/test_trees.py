"""The walk over a proposed tree, exhaustively on small vocabularies; its rules and reports."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from msgspec.structs import replace

from bus.protocol.codec import decode, encode
from bus.protocol.errors import LocalError
from bus.protocol.messages import Outcome
from decoding.engine import NO_PROBS, NO_ROWS, ProposedTree, TargetRow, Want
from decoding.methods.divergence import ElasticRule
from decoding.methods.exact import ExactRule
from decoding.methods.typical import TypicalRule, bound
from decoding.rows import reduced
from decoding.sampling import SamplingParams
from decoding.tree_reports import JudgedTree, tree_report
from decoding.trees import TreeJudge, Walked, depths, walk, with_tree
from decoding.verification import Plan, Reported

GREEDY = SamplingParams()
WHOSE = Reported("s1", 1, "edge-1", "c1", "medusa")
EVEN = np.array([0.5, 0.5], np.float16)


def tree(tokens: tuple[int, ...], parents: tuple[int, ...]) -> ProposedTree:
    return ProposedTree(tokens, parents, *NO_ROWS)


def rows_of(*own: int) -> list[TargetRow]:
    return [TargetRow(token, NO_PROBS, NO_PROBS, 1.0) for token in own]


def never(node: int, row: TargetRow) -> bool:
    return False


def shapes(size: int) -> Iterator[tuple[int, ...]]:
    """All trees of so many nodes, in topological order."""
    return itertools.product(*(range(-1, node) for node in range(size)))


def test_a_lossless_walk_is_the_targets_own_text_as_far_as_the_tree_has_it() -> None:
    """All trees of up to 4 nodes over 2 tokens, duplicate siblings included, all own tokens."""
    for size in range(5):
        for parents, tokens in itertools.product(
            shapes(size), itertools.product((0, 1), repeat=size)
        ):
            for own in itertools.product((0, 1), repeat=size + 1):
                walked = walk(tree(tokens, parents), rows_of(*own), never)
                place, text = -1, []
                for node in walked.path:
                    assert parents[node] == place
                    assert tokens[node] == own[place + 1]
                    place = node
                    text.append(tokens[node])
                assert walked.own == own[place + 1]
                below = [n for n, parent in enumerate(parents) if parent == place]
                assert walked.own not in [tokens[n] for n in below], "it goes on while it can"


def test_a_walk_ends_with_an_end_token_and_nothing_follows() -> None:
    chain = tree((5, 9, 6), (-1, 0, 1))
    walked = walk(chain, rows_of(5, 9, 6, 7), never, eos=frozenset({9}))
    assert walked == Walked((0, 1), None)
    assert walk(chain, rows_of(9, 0, 0, 0), never, eos=frozenset({9})) == Walked((), 9)


def test_a_rule_is_asked_about_the_first_child_alone_where_the_own_token_is_missing() -> None:
    asked: list[int] = []

    def accepts(node: int, row: TargetRow) -> bool:
        asked.append(node)
        return node != 4

    #    text ─► 1 (node 0), 2 (node 1);   2 ─► 3 (node 2), 3 (node 3);   3 ─► 4 (node 4)
    forked = tree((1, 2, 3, 3, 4), (-1, -1, 1, 1, 2))
    assert walk(forked, rows_of(2, 0, 9, 7, 0, 0), accepts) == Walked((1, 2), 7)
    assert asked == [2, 4]


def test_with_every_child_the_longest_path_wins_and_of_equals_the_targets_own() -> None:
    #    text ─► 1 (0), 2 (1), 3 (2);   2 ─► 4 (3);   3 ─► 5 (4)
    forked = tree((1, 2, 3, 4, 5), (-1, -1, -1, 1, 2))
    own = rows_of(3, 0, 0, 5, 0, 8)

    def all_but(*nodes: int) -> Walked:
        return walk(forked, own, lambda node, _: node not in nodes, every_child=True)

    assert all_but() == Walked((2, 4), 8), "two paths of two: that of the own token 3"
    assert walk(forked, rows_of(9, 0, 7, 0, 6, 8), lambda *_: True, True) == Walked((1, 3), 6)
    assert walk(forked, rows_of(9, 7, 0, 0, 0, 0), lambda n, _: n == 0, True) == Walked((0,), 7)


def test_typical_acceptance_is_as_published() -> None:
    """p₁(x) > min(0.09, 0.3·exp(−H)), of the temperature-1 distribution at every temperature."""
    probs = np.array([0.6, 0.2, 0.1, 0.06, 0.04])
    entropy = -float((probs * np.log(probs)).sum())
    assert bound(entropy) == pytest.approx(min(0.09, 0.3 * math.exp(-entropy)))
    for temperature in (0.0, 0.5):
        sampling = SamplingParams(temperature=temperature)
        forked = tree((0, 1, 2, 3, 4), (-1,) * 5)
        judge = TreeJudge(TypicalRule(), forked, sampling, 3, -1.0)
        made = with_tree(Plan((7,)), judge)
        assert made.entropy
        row = reduced(np.log(probs), want(made), sampling)
        assert row.entropy == pytest.approx(entropy)
        ids = made.row_ids[0]
        accepted = [
            judge.rule.accepts(judge.proposal(n, ids), row, sampling, 3, -1.0) for n in range(5)
        ]
        assert accepted == [prob > bound(entropy) for prob in probs]
        assert accepted == [True, True, True, False, False]
    assert bound(0.0) == 0.09
    assert bound(4.0) == pytest.approx(0.3 * math.exp(-4.0))


def want(plan: Plan) -> Want:
    return Want(0, plan.row_ids[0], plan.choices_at[0], entropy=plan.entropy)


def test_a_plan_with_a_tree_asks_for_a_choice_at_the_depth_of_each_node() -> None:
    forked = tree((5, 6, 7), (-1, 0, -1))
    sampled = TreeJudge(ExactRule(), forked, SamplingParams(temperature=1.0), 12, -1.0)
    made = with_tree(Plan((1, 2), most=8), sampled)
    assert made.feed == (1, 2, 5, 6, 7)
    assert made.parents == (-1, 0, 1, 2, 1)
    assert made.choices_at == (12, 13, 14, 13)
    assert [ids.size for ids in made.row_ids] == [0, 0, 0, 0]
    greedy = with_tree(Plan((1,)), replace(sampled, sampling=GREEDY))
    assert greedy.choices_at == (None,) * 4
    assert depths(forked.parents) == [1, 2, 1]


def elastic(threshold: float) -> tuple[TreeJudge, list[TargetRow]]:
    """Two children 4 and 5 of an even distribution over 3 and 4; the target prefers 3, then 5."""
    ids = np.array([[3, 4], [3, 5]], np.int32)
    forked = ProposedTree((4, 5), (-1, -1), ids, np.array([EVEN, EVEN]))
    judge = TreeJudge(ElasticRule(), forked, GREEDY, 3, threshold)
    logits = np.log(np.array([0.01, 0.01, 0.01, 0.5, 0.35, 0.12]))
    rows = [reduced(logits, replace(WANT, ids=wanted), GREEDY) for wanted in judge.wanted()]
    return judge, rows


WANT = Want(0)


def test_elastic_acceptance_lets_the_first_child_through_where_distributions_are_alike() -> None:
    judge, rows = elastic(0.2)
    assert judge.wanted()[0].tolist() == [3, 4, 5], "the first child's distribution, then the rest"
    walked = judge.walk(rows, frozenset())
    assert walked == Walked((0,), 3)
    report = tree_report(JudgedTree(judge, walked, tuple(rows), 10.0), WHOSE, 1.5)
    assert type(decode(encode(report))) is type(report)
    assert (report.outcome, report.num_drafted, report.num_accepted, report.num_own) == (
        Outcome.ACCEPTED, 1, 1, 1
    )  # fmt: skip
    assert report.expected_accepted == pytest.approx(0.85, abs=1e-3)
    assert report.mean_jsd is not None
    assert 0 < report.mean_jsd <= 0.2
    assert report.regret == pytest.approx(math.log(0.5 / 0.35))
    assert (report.num_scored, report.num_greedy) == (2, 1)
    judge, rows = elastic(-1.0)
    walked = judge.walk(rows, frozenset())
    assert walked == Walked((), 3)
    report = tree_report(JudgedTree(judge, walked, tuple(rows), 10.0), WHOSE)
    assert (report.outcome, report.num_accepted) == (Outcome.PARTIAL, 0)


def test_without_distributions_a_report_counts_accepted_tokens() -> None:
    chain = tree((5, 6, 7), (-1, 0, 1))
    judge = TreeJudge(ExactRule(), chain, GREEDY, 3, -1.0)
    rows = tuple(rows_of(5, 6, 9, 9))
    walked = judge.walk(rows, frozenset())
    report = tree_report(JudgedTree(judge, walked, rows, 10.0), WHOSE)
    assert (report.num_drafted, report.num_accepted, report.expected_accepted) == (3, 2, 2.0)
    assert report.mean_jsd is None
    assert (report.num_scored, report.regret) == (3, 0.0)
    warm = replace(judge, sampling=SamplingParams(temperature=1.0))
    assert tree_report(JudgedTree(warm, walked, rows, 1.0), WHOSE).num_scored == 0


ROWS = np.array([[5, 1]], np.int32), np.array([EVEN], np.float16)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (tree((1, 2, 3), (-1, 0, 1)), "at most 2"),
        (tree((1,), (0,)), "the index of an earlier one"),
        (tree((1, 2), (-1,)), "the index of an earlier one"),
        (tree((50,), (-1,)), "expected ids in 0 … 49"),
        (tree((-1,), (-1,)), "expected ids in 0 … 49"),
        (tree((1,), (-1,)), "expected int32 and float16"),
        (ProposedTree((1,), (-1,), np.array([[5, 1]]), EVEN[None]), "expected int32"),
        (ProposedTree((1,), (-1,), *ROWS), "not canonical"),
        (ProposedTree((1,), (-1,), ROWS[0], np.array([[np.nan, 0.1]], np.float16)), "canonical"),
        (ProposedTree((2,), (-1,), ROWS[0][:, ::-1], ROWS[1]), "lacks its own token"),
        (ProposedTree((1,), (-1,), np.array([[1, 60]], np.int32), ROWS[1]), "outside 0 … 49"),
    ],
)
def test_what_is_no_tree_for_the_pass_is_refused(bad: ProposedTree, why: str) -> None:
    with pytest.raises(LocalError, match=why):
        bad.check(50, 2, rows=True)


def test_an_empty_tree_and_one_with_its_rows_are_good() -> None:
    tree((), ()).check(50, 2, rows=True)
    ProposedTree((1,), (-1,), ROWS[0][:, ::-1], ROWS[1]).check(50, 2, rows=True)
