"""Drafts that read the target's features: what feedback carries, and what the edge makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.arrays import Float16Array, Int32Array, pack_tokens
from bus.protocol.messages import Feedback, OpenSession, TokenFeatures
from decoding import methods
from decoding.engine import TargetRow
from decoding.methods import Method
from decoding.sampling import SamplingParams
from decoding.token_features import carried, packed, unpacked
from tests.decoding.test_pair import fates
from tests.harness import EdgeCloudPair, Fate
from tests.toy import ToyDraft, ToyPair, target_alone

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=11)
PROMPT = (1, 2, 3)
NEVER: frozenset[int] = frozenset()
LENGTH = 24


def found(name: str = "eagle3-edge") -> Method:
    method = methods.find(name)
    assert method is not None
    return method


@dataclass
class LearningDraft(ToyDraft):
    """Drafts after it has learnt, and checks that it has learnt the text's own features."""

    learnt: dict[int, Float16Array] = field(default_factory=dict)
    silences: int = 0

    def learn(self, start: int, features: Float16Array) -> None:
        assert features.shape[1:] == (3, 2)
        self.learnt |= dict(enumerate(features, start))

    def draft(
        self, feed: tuple[int, ...], count: int, eos: frozenset[int]
    ) -> tuple[int, tuple[int, ...], Int32Array, Float16Array]:
        text = self.cache + feed
        for position, levels in self.learnt.items():
            assert position <= len(text) - 2, "features come with the token after them"
            np.testing.assert_allclose(
                levels, self.pair.features(text[: position + 1]), atol=0.5 * 1.5 / 127 + 1e-2
            )
        if self.learnt:
            return super().draft(feed, count, eos)
        self.silences += 1
        self.cache = text
        return len(text), (), np.empty((0, 1), np.int32), np.empty((0, 1), np.float16)


@dataclass(frozen=True)
class LearningPair(ToyPair):
    def draft(self, sampling: SamplingParams) -> LearningDraft:
        return LearningDraft(self, sampling)


def session(
    pair: ToyPair, sampling: SamplingParams = GREEDY, name: str = "eagle3-edge", **more: object
) -> EdgeCloudPair:
    return EdgeCloudPair(pair, sampling, method=found(name), **more)  # type: ignore[arg-type]


def draft_of(run: EdgeCloudPair) -> LearningDraft:
    assert isinstance(run._draft, LearningDraft)
    return run._draft


pairs = st.builds(
    LearningPair, vocab_size=st.integers(2, 9), agreement=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 50), num_sparse=st.integers(1, 9),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    pair=pairs, sampling=st.sampled_from([GREEDY, SAMPLED]), fates=fates,
    forget=st.frozensets(st.integers(0, 30), max_size=2), length=st.integers(1, LENGTH),
    end=st.none() | st.integers(0, 8),
)  # fmt: skip
def test_the_text_is_the_targets_own_over_any_link(
    pair: ToyPair, sampling: SamplingParams, fates: tuple[Fate, ...], forget: frozenset[int],
    length: int, end: int | None,
) -> None:  # fmt: skip
    eos = NEVER if end is None else frozenset({end})
    run = session(pair, sampling, fates=fates, forget_at=forget, eos=eos, max_new_tokens=length)
    assert run.run() == target_alone(pair, PROMPT, sampling, length, eos)


def test_over_a_good_link_every_token_comes_with_the_features_before_it() -> None:
    run = session(LearningPair(agreement=1.0))
    run.run()
    assert sorted(draft_of(run).learnt) == list(range(len(PROMPT) - 1, len(PROMPT) + LENGTH - 1))
    assert sum(run.accepted) > LENGTH // 2
    assert draft_of(run).silences == 1, "before the first feedback"
    assert [m.features for m in run.sent if isinstance(m, OpenSession)] == [True]


def test_text_that_is_sent_again_comes_without_and_drafting_goes_on() -> None:
    pair = LearningPair(agreement=1.0)
    run = session(pair, fates=(*[Fate()] * 4, Fate(()), Fate(()), Fate(())), max_new_tokens=60)
    assert run.run() == target_alone(pair, PROMPT, GREEDY, 60, NEVER)
    learnt = draft_of(run).learnt
    wanted = set(range(len(PROMPT) - 1, len(PROMPT) + 59))
    assert set(learnt) < wanted
    assert max(learnt) == max(wanted)


def test_other_methods_and_an_edge_without_drafts_ask_for_none() -> None:
    for name, drafts in (("auto", True), ("eagle3-edge", False)):
        run = session(LearningPair(agreement=1.0), name=name, drafts=drafts)
        run._draft = ToyDraft(run.pair, GREEDY)  # type: ignore[arg-type]  # drafts without
        run.run()
        assert not any(m.features for m in run.sent if isinstance(m, OpenSession | Feedback))


def test_the_elastic_rule_keeps_rows_and_their_features_come_too() -> None:
    run = session(LearningPair(agreement=0.8), name="e2sci+eagle3-edge", max_new_tokens=60)
    assert len(run.run()) == 60
    assert len(draft_of(run).learnt) > 20


def test_a_method_that_reads_features_needs_them_at_both_ends() -> None:
    method = found()
    assert method.lossless
    assert method.reads_features
    assert method.needs == ("hidden_states",)
    assert not found("eagle3").reads_features


# --- as they travel -----------------------------------------------------------------------------


def rows_of(levels: np.ndarray) -> list[TargetRow]:
    none = np.empty(0)
    return [TargetRow(0, none, none, 1.0, features=part.astype(np.float16)) for part in levels]


def test_levels_are_rounded_to_a_127th_of_their_greatest() -> None:
    levels = np.random.default_rng(1).normal(size=(5, 3, 64))
    levels[2, 1] = 0
    levels[3, 0, 7] = 20
    features = packed(rows_of(levels))
    assert features is not None
    assert len(features.levels) + len(features.scales) == 5 * 3 * (64 + 2)
    steps = np.abs(levels).max(axis=2, keepdims=True) / 127
    assert (np.abs(unpacked(features) - levels) <= 0.6 * steps + 2e-3).all()


def test_a_pass_of_which_one_row_was_not_asked_gives_none() -> None:
    rows = rows_of(np.ones((2, 3, 4)))
    bare = TargetRow(0, np.empty(0), np.empty(0), 1.0)
    assert packed([rows[0], bare]) is None
    assert packed([]) is None


def test_a_part_of_what_a_feedback_carries() -> None:
    levels = np.arange(4 * 3 * 2).reshape(4, 3, 2) - 12
    given = packed(rows_of(levels))
    feedback = Feedback(7, 10, pack_tokens((1, 2, 3, 4)), 1, 0, 0, 0, 4, features=given)
    part = carried(feedback, 11, 2)
    assert given is not None
    assert part is not None
    np.testing.assert_array_equal(unpacked(part), unpacked(given)[1:3])
    assert carried(Feedback(7, 10, pack_tokens((1,)), 1, 0, 0, 0, 1), 10, 1) is None


@pytest.mark.parametrize(
    ("levels", "scales"),
    [
        (b"", bytes(12)),
        (bytes(7), bytes(12)),
        (bytes(12), bytes(10)),
        (bytes(12), np.full(6, np.nan, "<f2").tobytes()),
        (bytes(12), np.full(6, -1, "<f2").tobytes()),
        (bytes(12), np.full(6, np.inf, "<f2").tobytes()),
    ],
)
def test_features_of_another_size_are_refused(levels: bytes, scales: bytes) -> None:
    TokenFeatures(bytes(12), bytes(12)).check(2)
    with pytest.raises(ValueError, match=r"levels|scales"):
        TokenFeatures(levels, scales).check(2)
    with pytest.raises(ValueError, match=r"levels|scales"):
        Feedback(7, 5, pack_tokens((9, 3)), 3, 0, 0, 0, 3, features=TokenFeatures(levels, scales))
    with pytest.raises(ValueError, match="levels"):
        TokenFeatures(b"", b"").check(0)
