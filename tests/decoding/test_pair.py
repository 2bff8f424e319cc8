"""Conversations between both machines: a good link, then every kind of bad one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.messages import (
    Ack,
    DraftWindow,
    FaultCode,
    Feedback,
    FinishReason,
    OpenSession,
)
from decoding import methods
from decoding.methods.base import Pace
from decoding.methods.paces import Ahead, Lockstep
from decoding.sampling import SamplingParams
from tests.harness import SD, EdgeCloudPair, Fate, Steady
from tests.toy import ToyPair, likely_tree, target_alone

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
    run = EdgeCloudPair(
        pair, SAMPLED, windows=windows, fates=fates, forget_at=forget, prompt=(1, 0)
    )
    assert run.run() == target_alone(pair, (1, 0), SAMPLED, 24, frozenset())


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


# --- a target that goes on by itself ----------------------------------------------------------


paces = st.sampled_from(
    [
        Lockstep(), Ahead(), Steady(1, 3), Steady(2, 5), Steady(3, 3), Steady(1, 6, 0.01),
        Steady(2, 5, 0.05), Steady(1, 3, 0.0),
    ]
)  # fmt: skip
CUT = SamplingParams(temperature=1.2, top_p=0.8, seed=7)


def running_on(pair: ToyPair, sampling: SamplingParams, pace: Pace, **kwargs: Any) -> EdgeCloudPair:
    method = replace(SD, name="runs-on", pace=pace, runs_on=True)
    return EdgeCloudPair(pair, sampling, method=method, **kwargs)


@settings(max_examples=150, deadline=None)
@given(
    pair=pairs, fates=fates, windows=windows, sampling=st.sampled_from([GREEDY, SAMPLED, CUT]),
    pace=paces, forget=st.frozensets(st.integers(0, 40), max_size=3),
    busy_ms=st.sampled_from([0.0, 7.0, 30.0]), lease=st.sampled_from([1, 3, 256]),
    drafts=st.booleans(), draft_ms=st.sampled_from([1.0, 5.0, 20.0]),
)  # fmt: skip
def test_where_the_target_goes_on_the_text_is_its_own_over_any_link(
    pair: ToyPair, fates: tuple[Fate, ...], windows: tuple[int, ...], sampling: SamplingParams,
    pace: Pace, forget: frozenset[int], busy_ms: float, lease: int, drafts: bool, draft_ms: float,
) -> None:  # fmt: skip
    run = running_on(
        pair, sampling, pace, windows=windows, fates=fates, forget_at=forget, prompt=(1, 0),
        busy_ms=busy_ms, lease=lease, drafts=drafts, draft_ms=draft_ms,
    )  # fmt: skip
    assert run.run() == target_alone(pair, (1, 0), sampling, 24, frozenset())
    assert {fault.code for fault in run.faults} <= {FaultCode.UNKNOWN_SESSION}


def test_a_thin_client_gets_the_whole_answer_and_acknowledges_it() -> None:
    run = running_on(ToyPair(), GREEDY, Lockstep(), drafts=False, max_new_tokens=60)
    assert run.run() == target_alone(ToyPair(), (1, 2, 3), GREEDY, 60, frozenset())
    assert not any(run.accepted)
    assert {type(message) for message in run.sent} >= {Ack, Feedback}
    assert not any(isinstance(message, DraftWindow) for message in run.sent)


def test_a_slow_draft_makes_no_answer_slower() -> None:
    """The target never waits: its passes follow each other as without a draft."""
    alone = running_on(ToyPair(agreement=0.0), GREEDY, Steady(2, 5), drafts=False)
    drafted = running_on(ToyPair(agreement=0.0), GREEDY, Steady(2, 5), draft_ms=50.0)
    for run in (alone, drafted):
        run.run()
    assert drafted.now_ms <= alone.now_ms


def test_a_fast_draft_that_agrees_makes_it_faster() -> None:
    alone = running_on(ToyPair(agreement=1.0), GREEDY, Steady(3, 12), drafts=False)
    drafted = running_on(ToyPair(agreement=1.0), GREEDY, Steady(3, 12), draft_ms=1.0)
    for run in (alone, drafted):
        run.run()
    assert drafted.now_ms < 0.7 * alone.now_ms
    assert any(drafted.accepted)


def test_a_draft_that_is_half_right_is_rescued() -> None:
    """Over a long link, with time to draft branches: the same text in less time."""
    pair, times, rescued = ToyPair(agreement=0.6, seed=3), [], 0
    for rescue in (None, 0.02):
        link = (Fate((40.0,)),) * 2000
        run = running_on(
            pair, GREEDY, Steady(1, 8, rescue), draft_ms=3.0, busy_ms=30.0, max_new_tokens=60,
            fates=link,
        )  # fmt: skip
        assert run.run() == target_alone(pair, (1, 2, 3), GREEDY, 60, frozenset())
        times.append(run.now_ms)
        rescued += run.rescued
    assert rescued > 3
    assert times[1] < 0.95 * times[0]


@pytest.mark.parametrize("name", ["sd", "auto", "plc", "eagle3"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_an_answer_may_go_on_after_its_end_token(name: str, sampling: SamplingParams) -> None:
    pair = ToyPair(agreement=0.7, speculator=likely_tree, num_sparse=7, seed=3)
    whole = target_alone(pair, (1, 2, 3), sampling, 24, frozenset())
    eos = frozenset((whole[4],))
    method = methods.find(name)
    assert method is not None
    cut = EdgeCloudPair(pair, sampling, method=method, eos=eos).run()
    assert len(cut) < 24
    run = EdgeCloudPair(pair, sampling, method=method, eos=eos, ignore_eos=True)
    assert run.run() == whole
