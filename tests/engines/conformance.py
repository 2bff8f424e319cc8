"""What every engine must do. Subclass, give the fixture, and pytest runs all of it.

    class TestMine(TargetConformance):
        @pytest.fixture
        def target(self) -> Target[Any]:
            return MyTarget(...)

`PROMPT` and the drafted tokens lie below 40: the model needs a vocabulary of at least that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bus.protocol.errors import LocalError
from decoding.coupling import choose
from decoding.engine import NUM_TOP, Coupling, Segment, Target, TargetRow, Want
from decoding.sampling import SamplingParams

GREEDY = SamplingParams()
PLAIN = SamplingParams(temperature=1.0, seed=7)
WARPED = SamplingParams(temperature=0.8, top_p=0.9, top_k=30, seed=11)
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
TEXT = (5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4)
PARENTS = (-1, 0, 0, 1, 1, 2, -1, 6, 6, 3, 3, 8, 11, 12, 0, 9)  # of a tree of 16 tokens
IDS = np.array([3, 17, 0, 39], np.int32)
SCORED = tuple(IDS.tolist())


def wants(size: int, **what: Any) -> tuple[Want, ...]:
    return tuple(Want(index, IDS, **what) for index in range(size))


def path_to(node: int) -> list[int]:
    """The tokens of the tree from its root to a node, by index."""
    path = [node]
    while PARENTS[path[0]] >= 0:
        path.insert(0, PARENTS[path[0]])
    return path


def speculators(target: Target[Any]) -> tuple[str, ...]:
    """Those that it can propose by; without any the test is skipped."""
    if not target.speculators:
        pytest.skip("the target has no speculator")
    return target.speculators


class TargetConformance:
    """Of a `decoding.engine.Target`."""

    def same(self, target: Target[Any], one: TargetRow, other: TargetRow) -> None:
        """Equal: bit for bit where the engine says so."""
        assert one.argmax == other.argmax
        for a, b in ((one.p1_at_q, other.p1_at_q), (one.p_at_q, other.p_at_q)):
            if target.capabilities.bitwise:
                np.testing.assert_array_equal(a, b)
            else:
                np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6)

    def fresh(
        self, target: Target[Any], tokens: tuple[int, ...], sampling: SamplingParams = PLAIN
    ) -> list[TargetRow]:
        """Rows of `tokens` after the prompt, in a session of their own, token by token."""
        cache = target.open(sampling)
        target.run([Segment(cache, PROMPT)])
        rows = [target.run([Segment(cache, (token,), wants(1))])[0][0] for token in tokens]
        target.close(cache)
        return rows

    # --- chains -------------------------------------------------------------------------------

    @pytest.mark.parametrize("sizes", [[16], [1] * 16, [3, 5, 8], [15, 1]])
    @pytest.mark.parametrize("sampling", [GREEDY, PLAIN, WARPED])
    def test_a_chain_gives_the_same_rows_however_it_is_cut(
        self, target: Target[Any], sizes: list[int], sampling: SamplingParams
    ) -> None:
        cache, begin, rows = target.open(sampling), 0, list[TargetRow]()
        target.run([Segment(cache, PROMPT[:3])])
        target.run([Segment(cache, PROMPT[3:])])
        for size in sizes:
            tokens = TEXT[begin : begin + size]
            rows += target.run([Segment(cache, tokens, wants(size))])[0]
            begin += size
        assert target.length(cache) == len(PROMPT) + 16
        for row, expected in zip(rows, self.fresh(target, TEXT, sampling), strict=True):
            self.same(target, row, expected)

    def test_only_the_rows_wanted_are_given(self, target: Target[Any]) -> None:
        cache = target.open(PLAIN)
        segment = Segment(cache, PROMPT + TEXT, (Want(len(PROMPT)), Want(len(PROMPT) + 9, IDS)))
        first, second = target.run([segment])[0]
        expected = self.fresh(target, TEXT)
        assert first.p1_at_q.size == 0
        assert first.argmax == expected[0].argmax
        self.same(target, second, expected[9])

    def test_after_a_rollback_other_tokens_follow(self, target: Target[Any]) -> None:
        cache = target.open(PLAIN)
        target.run([Segment(cache, PROMPT + TEXT)])
        target.keep(cache, len(PROMPT) + 2)
        assert target.length(cache) == len(PROMPT) + 2
        (row,) = target.run([Segment(cache, (33,), wants(1))])[0]
        self.same(target, row, self.fresh(target, (*TEXT[:2], 33))[-1])

    # --- rows ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("sampling", [GREEDY, PLAIN, WARPED])
    def test_what_a_row_tells_agrees(self, target: Target[Any], sampling: SamplingParams) -> None:
        cache, plain = target.open(sampling), target.open(PLAIN)
        full = target.capabilities.full_rows
        want = Want(len(PROMPT) - 1, IDS, choice_at=8, gap=True, top=True, full=full, scored=SCORED)
        row = target.run([Segment(cache, PROMPT, (want,))])[0][0]
        assert row.top is not None
        ids, logs = row.top
        assert len(ids) == min(NUM_TOP, target.vocab_size)
        assert ids[0] == row.argmax
        assert (np.diff(logs) <= 0).all()
        assert np.exp(logs[0]) == pytest.approx(row.p1_max, rel=1e-6)
        assert row.gap == pytest.approx(logs[0] - logs[1], abs=1e-5)
        known = dict(row.scored)
        assert set(known) == {*SCORED, row.choice.token if row.choice else row.argmax}
        among = dict(zip(ids.tolist(), logs.tolist(), strict=True))
        assert all(log == pytest.approx(among.get(t, log), abs=1e-9) for t, log in known.items())
        assert [known[t] for t in IDS.tolist()] == pytest.approx(np.log(row.p1_at_q), abs=1e-6)
        assert row.choice is not None
        if sampling.greedy:
            assert row.choice.token == row.argmax
            assert row.choice.gap == pytest.approx(row.gap)
        if full:
            again = target.run([Segment(plain, PROMPT, (want,))])[0][0]
            assert row.full is not None
            assert again.full is not None
            assert again.full.shape == (target.vocab_size,)
            assert again.full.sum() == pytest.approx(1, abs=1e-6)
            np.testing.assert_allclose(row.p1_at_q, again.full[IDS], rtol=1e-5, atol=1e-12)
            if not sampling.greedy:
                np.testing.assert_allclose(row.p_at_q, row.full[IDS], rtol=1e-5, atol=1e-12)
        if full and not sampling.greedy and target.capabilities.coupling is Coupling.GUMBEL:
            assert row.full is not None
            kept = np.flatnonzero(row.full)
            log_p = np.log(np.maximum(row.full, 1e-300))
            expected = choose(log_p, 1.0, sampling.seed, 8, kept)
            assert row.choice.token == expected.token
            assert row.choice.gap == pytest.approx(expected.gap, abs=1e-4)

    def test_a_row_can_be_asked_for_again(self, target: Target[Any]) -> None:
        cache = target.open(PLAIN)
        target.run([Segment(cache, PROMPT)])
        given = target.run([Segment(cache, TEXT[:3], wants(3))])[0]
        target.keep(cache, len(PROMPT) + 1)
        for index in range(3):
            self.same(target, target.row(cache, index, Want(0, IDS)), given[index])
        for index in (-1, 3):
            with pytest.raises(LocalError):
                target.row(cache, index, Want(0))
        target.run([Segment(cache, (1,))])
        with pytest.raises(LocalError):
            target.row(cache, 0, Want(0))

    def test_rows_of_a_pass_in_pieces_are_counted_on(self, target: Target[Any]) -> None:
        cache = target.open(PLAIN)
        first = target.run([Segment(cache, PROMPT, (Want(7, IDS),))])[0]
        more = target.run([Segment(cache, TEXT[:2], wants(2), continues=True)])[0]
        for index, row in enumerate([*first, *more]):
            self.same(target, target.row(cache, index, Want(0, IDS)), row)

    def test_hidden_states_are_given_or_declared_missing(self, target: Target[Any]) -> None:
        if not target.capabilities.hidden_states:
            return
        cache = target.open(GREEDY)
        rows = target.run([Segment(cache, PROMPT, (Want(0, hidden=True), Want(7, hidden=True)))])[0]
        shapes = {row.hidden.shape for row in rows if row.hidden is not None}
        assert len(shapes) == 1
        assert all(row.hidden is not None and np.isfinite(row.hidden).all() for row in rows)

    def test_features_come_with_hidden_states_and_are_normalised(self, target: Target[Any]) -> None:
        if not target.capabilities.hidden_states:
            return
        cache = target.open(GREEDY)
        what = (Want(0, features=True), Want(3), Want(7, features=True))
        first, without, last = target.run([Segment(cache, PROMPT, what)])[0]
        assert without.features is None
        for row in (first, last):
            assert row.features is not None
            assert row.features.dtype == np.float16
            assert row.features.shape[0] == 3
            squares = row.features.astype(np.float32) ** 2
            np.testing.assert_allclose(squares.mean(axis=1), 1, atol=0.02)
        again = target.row(cache, 1, Want(0)), target.row(cache, 2, Want(0, features=True))
        assert again[0].features is None
        np.testing.assert_array_equal(again[1].features, last.features)

    def test_the_entropy_is_that_of_the_whole_row_at_temperature_1(
        self, target: Target[Any]
    ) -> None:
        cache, ids = target.open(WARPED), np.arange(target.vocab_size, dtype=np.int32)
        what = (Want(3, ids, entropy=True), Want(7, ids))
        wanted, plain = target.run([Segment(cache, PROMPT, what)])[0]
        assert plain.entropy is None
        probs = wanted.p1_at_q[wanted.p1_at_q > 0]
        assert wanted.entropy == pytest.approx(-float((probs * np.log(probs)).sum()), abs=1e-5)

    # --- speculators --------------------------------------------------------------------------

    def test_a_speculator_that_it_has_not_is_refused(self, target: Target[Any]) -> None:
        with pytest.raises(LocalError, match="no speculator 'crystal-ball'"):
            target.open(GREEDY, "crystal-ball")

    def test_a_session_without_a_speculator_proposes_nothing(self, target: Target[Any]) -> None:
        cache = target.open(GREEDY)
        target.run([Segment(cache, PROMPT)])
        with pytest.raises(LocalError):
            target.propose(cache, TEXT[:1], 4)

    @pytest.mark.parametrize("rows", [False, True])
    @pytest.mark.parametrize("most", [1, 2, 7, 16])
    def test_what_is_proposed_is_a_tree_of_at_most_so_many(
        self, target: Target[Any], most: int, rows: bool
    ) -> None:
        for kind in speculators(target):
            cache = target.open(PLAIN, kind)
            target.run([Segment(cache, PROMPT)])
            tree = target.propose(cache, TEXT[:1], most, rows)
            tree.check(target.vocab_size, most, rows)
            assert tree.tokens
            children = list(zip(tree.parents, tree.tokens, strict=True))
            assert len(set(children)) == len(children), "siblings differ"
            assert tree.q_ids.size > 0 or not rows

    def test_siblings_come_in_falling_order_of_probability(self, target: Target[Any]) -> None:
        for kind in speculators(target):
            cache = target.open(PLAIN, kind)
            target.run([Segment(cache, PROMPT)])
            tree = target.propose(cache, TEXT[:1], 16, rows=True)
            for parent in set(tree.parents):
                siblings = [n for n, above in enumerate(tree.parents) if above == parent]
                probs = [
                    float(tree.q_probs[n][tree.q_ids[n] == tree.tokens[n]][0]) for n in siblings
                ]
                assert probs == sorted(probs, reverse=True)

    def test_proposing_changes_nothing_that_a_pass_sees(self, target: Target[Any]) -> None:
        for kind in speculators(target):
            cache = target.open(PLAIN, kind)
            target.run([Segment(cache, PROMPT)])
            for token, expected in zip(TEXT[:6], self.fresh(target, TEXT[:6]), strict=True):
                held = target.length(cache)
                tree = target.propose(cache, (token,), 5)
                assert target.length(cache) == held
                feed = (token, *tree.tokens)
                parents = (-1, *(parent + 1 for parent in tree.parents))
                rows = target.run([Segment(cache, feed, (Want(0, IDS),), parents)])[0]
                self.same(target, rows[0], expected)
                target.keep(cache, held, (0,))

    def test_a_session_with_a_speculator_gives_the_same_rows_along_its_paths(
        self, target: Target[Any]
    ) -> None:
        for kind in speculators(target):
            cache, text = target.open(PLAIN, kind), list(TEXT[:1])
            target.run([Segment(cache, PROMPT)])
            for _ in range(4):
                held = target.length(cache)
                feed = text[held - len(PROMPT) :]
                tree = target.propose(cache, feed, 6)
                parents = (*range(-1, len(feed) - 1), *(p + len(feed) for p in tree.parents))
                tokens = (*feed, *tree.tokens)
                rows = target.run([Segment(cache, tokens, wants(len(tokens)), parents)])[0]
                path = list(range(len(feed)))
                while children := [n for n, p in enumerate(parents) if p == path[-1]]:
                    path.append(children[-1])
                text += [tokens[n] for n in path[len(feed) :]]
                fresh = self.fresh(target, tuple(text))[held - len(PROMPT) :]
                for index, expected in zip(path, fresh, strict=True):
                    self.same(target, rows[index], expected)
                target.keep(cache, held, path)
                text += [7]

    # --- trees --------------------------------------------------------------------------------

    def test_a_tree_gives_the_rows_of_its_paths(self, target: Target[Any]) -> None:
        cache = target.open(PLAIN)
        target.run([Segment(cache, PROMPT)])
        segment = Segment(cache, TEXT, wants(16), PARENTS)
        if not target.capabilities.trees:
            with pytest.raises(LocalError):
                target.run([segment])
            return
        rows = target.run([segment])[0]
        for node in range(16):
            path = tuple(TEXT[index] for index in path_to(node))
            self.same(target, rows[node], self.fresh(target, path)[-1])

    @pytest.mark.parametrize("node", [0, 2, 7, 13, 15])
    def test_a_path_that_is_kept_goes_on_as_a_chain(self, target: Target[Any], node: int) -> None:
        if not target.capabilities.trees:
            return
        cache, path = target.open(PLAIN), path_to(node)
        target.run([Segment(cache, PROMPT)])
        target.run([Segment(cache, TEXT, (), PARENTS)])
        target.keep(cache, len(PROMPT), path)
        assert target.length(cache) == len(PROMPT) + len(path)
        (row,) = target.run([Segment(cache, (21,), wants(1))])[0]
        tokens = tuple(TEXT[index] for index in path)
        self.same(target, row, self.fresh(target, (*tokens, 21))[-1])

    # --- batches ------------------------------------------------------------------------------

    def test_sessions_in_a_batch_do_not_see_each_other(self, target: Target[Any]) -> None:
        one, two, three = (target.open(sampling) for sampling in (PLAIN, GREEDY, WARPED))
        target.run([Segment(one, PROMPT), Segment(two, PROMPT[:5])])
        tree = (PARENTS[:5],) if target.capabilities.trees else ()
        rows = target.run(
            [
                Segment(one, TEXT[:4], wants(4)),
                Segment(two, PROMPT[5:]),
                Segment(three, PROMPT, (Want(7, IDS),)),
            ]
        )
        assert [len(given) for given in rows] == [4, 0, 1]
        for row, expected in zip(rows[0], self.fresh(target, TEXT[:4]), strict=True):
            self.same(target, row, expected)
        rows = target.run(
            [Segment(two, TEXT[:5], wants(5), *tree), Segment(three, TEXT[:2], wants(2))]
        )
        self.same(target, rows[0][0], self.fresh(target, TEXT[:1], GREEDY)[0])
        for row, expected in zip(rows[1], self.fresh(target, TEXT[:2], WARPED), strict=True):
            self.same(target, row, expected)

    def test_a_session_that_ends_leaves_the_others(self, target: Target[Any]) -> None:
        one, other = target.open(PLAIN), target.open(PLAIN)
        target.run([Segment(one, PROMPT), Segment(other, PROMPT)])
        target.close(other)
        (row,) = target.run([Segment(one, TEXT[:1], wants(1))])[0]
        self.same(target, row, self.fresh(target, TEXT[:1])[0])

    # --- errors -------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "wrong",
        [
            {"tokens": ()},
            {"tokens": (1, 2), "wants": (Want(2),)},
            {"tokens": (1, 2), "wants": (Want(1), Want(0))},
            {"tokens": (1, 2), "parents": (-1,)},
            {"tokens": (1, 2), "parents": (-1, 1)},
            {"tokens": (1, 2), "parents": (-2, 0)},
        ],
    )
    def test_a_segment_that_is_none_changes_nothing(
        self, target: Target[Any], wrong: dict[str, Any]
    ) -> None:
        cache, other = target.open(PLAIN), target.open(PLAIN)
        target.run([Segment(cache, PROMPT)])
        with pytest.raises(LocalError):
            target.run([Segment(other, PROMPT), Segment(cache, **wrong)])
        assert (target.length(cache), target.length(other)) == (len(PROMPT), 0)
        (row,) = target.run([Segment(cache, TEXT[:1], wants(1))])[0]
        self.same(target, row, self.fresh(target, TEXT[:1])[0])

    @pytest.mark.parametrize("length", [-1, 9])
    def test_more_than_is_held_cannot_be_kept(self, target: Target[Any], length: int) -> None:
        cache = target.open(GREEDY)
        target.run([Segment(cache, PROMPT)])
        with pytest.raises(LocalError):
            target.keep(cache, length)
        assert target.length(cache) == len(PROMPT)
