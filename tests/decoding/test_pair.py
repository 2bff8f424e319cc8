"""Conversations between both machines: a good link, then every kind of bad one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.messages import DraftWindow, FinishReason, OpenSession
from decoding.sampling import SamplingParams
from tests.harness import EdgeCloudPair, Fate
from tests.toy import ToyPair, target_alone

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=11)

fates = st.lists(
    st.builds(
        Fate,
        st.lists(st.floats(1, 3000), min_size=0, max_size=3).map(tuple),
    ),
    max_size=60,
).map(tuple)
windows = st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple)
pairs = st.builds(
    ToyPair,
    vocab_size=st.integers(2, 9),
    agreement=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 50),
    num_sparse=st.integers(1, 9),
    lookup=st.sampled_from([0, 1, 2]),
)


def test_greedy_answer_is_the_targets_own() -> None:
    pair = ToyPair()
    got = EdgeCloudPair(pair, GREEDY).run()
    assert got == target_alone(pair, (1, 2, 3), GREEDY, 24, frozenset())


def test_a_full_acceptance_commits_the_bonus_token_too() -> None:
    run = EdgeCloudPair(ToyPair(agreement=1.0), GREEDY, max_new_tokens=10, windows=(4,))
    run.run()
    windows_sent = [m for m in run.sent if isinstance(m, DraftWindow)]
    assert len(windows_sent) == 2  # 4 + 1 bonus each
    assert run.accepted == [True] * 4 + [False] + [True] * 4 + [False]


def test_eos_in_the_middle_of_a_window_ends_the_answer_there() -> None:
    pair = ToyPair(agreement=1.0)
    alone = target_alone(pair, (1, 2, 3), GREEDY, 24, frozenset())
    eos = frozenset({alone[2]})
    run = EdgeCloudPair(pair, GREEDY, eos=eos, windows=(6,))
    assert run.run() == target_alone(pair, (1, 2, 3), GREEDY, 24, eos)
    assert run.finished is not None
    assert run.finished.reason is FinishReason.STOP


@settings(max_examples=120, deadline=None)
@given(
    pair=pairs, fates=fates, windows=windows, forget=st.frozensets(st.integers(0, 40), max_size=3)
)
def test_greedy_is_exact_over_any_link(
    pair: ToyPair, fates: tuple[Fate, ...], windows: tuple[int, ...], forget: frozenset[int]
) -> None:
    run = EdgeCloudPair(pair, GREEDY, windows=windows, fates=fates, forget_at=forget, prompt=(1, 0))
    assert run.run() == target_alone(pair, (1, 0), GREEDY, 24, frozenset())
    assert run.finished is not None
    assert run.finished.reason is FinishReason.LENGTH


@settings(max_examples=80, deadline=None)
@given(
    pair=pairs, fates=fates, windows=windows, forget=st.frozensets(st.integers(0, 40), max_size=3)
)
def test_sampled_text_depends_on_seed_and_prompt_only(
    pair: ToyPair, fates: tuple[Fate, ...], windows: tuple[int, ...], forget: frozenset[int]
) -> None:
    calm = EdgeCloudPair(pair, SAMPLED, windows=(3,), prompt=(1, 0)).run()
    run = EdgeCloudPair(
        pair, SAMPLED, windows=windows, fates=fates, forget_at=forget, prompt=(1, 0)
    )
    assert run.run() == calm


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("num_committed", [1, 5, 23])
def test_an_edge_that_takes_over_goes_on_with_the_same_text(
    sampling: SamplingParams, num_committed: int
) -> None:
    pair = ToyPair()
    whole = EdgeCloudPair(pair, sampling).run()
    second = EdgeCloudPair(pair, sampling, committed=whole[:num_committed])
    assert second.run() == whole


def test_a_restarted_cloud_is_told_what_was_promised() -> None:
    run = EdgeCloudPair(ToyPair(), GREEDY, forget_at=frozenset({8}))
    run.run()
    opens = [m for m in run.sent if isinstance(m, OpenSession)]
    assert len(opens) == 2
    assert opens[1].incarnation > opens[0].incarnation
    assert len(opens[1].committed) > 0
