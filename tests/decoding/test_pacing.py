"""What is measured, what is predicted from it, and what the paces make of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from decoding.methods.base import PaceView
from decoding.methods.paces import MAX_ROOM, MIN_ROOM, Ahead, AheadLiterally, WherePaying
from decoding.pacing import (
    LEAST_CHANCE,
    MAX_LOCKSTEP_WINDOW,
    MAX_MESSAGE,
    PATH_SAMPLES,
    RUN_SHARE,
    Acceptance,
    Costs,
    Forecast,
    Measures,
    PassTimes,
    eta,
    forecast,
    useful_ahead,
)


def measured(
    rtt_ms: float = 40.0, step_ms: float = 20.0, base_ms: float = 60.0, per_token_ms: float = 5.0,
    acceptance: float = 0.9, slower_ahead: float = 1.0,
) -> Measures:  # fmt: skip
    """After many samples of a steady world."""
    measures = Measures(acceptance=Acceptance(acceptance * 60, 60.0))
    for _ in range(3):
        for n in (1, 3, 5, 9):
            pass_ms = base_ms + per_token_ms * n
            measures = measures.passed(n, pass_ms, alone=True)
            measures = measures.passed(n, pass_ms * slower_ahead, alone=False)
            measures = measures.drafted(2, 2 * step_ms, 1.0, alone=True)
            measures = measures.drafted(2, 2 * step_ms * slower_ahead, 1.0, alone=False)
            measures = measures.answered(rtt_ms)
    return measures


def predicted(**world: Any) -> Forecast:
    made = forecast(measured(**world))
    assert made is not None
    return made


# --- measuring --------------------------------------------------------------------------------


@given(st.floats(1, 200), st.floats(0, 20))
def test_passes_of_several_lengths_give_their_line(base_ms: float, per_token_ms: float) -> None:
    passes = PassTimes()
    for n in (1, 4, 8, 16) * 6:
        passes = passes.sample(n, base_ms + per_token_ms * n)
    alpha, beta = passes.line()
    for n in (1, 16):
        assert alpha + beta * n == pytest.approx(base_ms + per_token_ms * n, rel=0.06)


@given(st.integers(1, 64), st.floats(1, 1000))
def test_passes_of_one_length_are_met_and_longer_ones_believed_slower(n: int, ms: float) -> None:
    alpha, beta = PassTimes().sample(n, ms).line()
    assert alpha + beta * n == pytest.approx(ms)
    assert alpha >= 0
    assert beta > 0


def test_old_passes_fade() -> None:
    passes = PassTimes()
    for ms in [500.0] * 20 + [50.0] * 60:
        passes = passes.sample(4, ms)
    alpha, beta = passes.line()
    assert alpha + 4 * beta == pytest.approx(50.0, rel=0.5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_acceptance_is_learnt_per_token(rate: float) -> None:
    acceptance = Acceptance()
    for i in range(400):
        stands = (i * 7919) % 100 < 100 * rate
        acceptance = acceptance.judged_as(int(stands), not stands)
    assert acceptance.rate == pytest.approx(rate, abs=0.08)
    light = acceptance.recalled()
    assert light.rate == pytest.approx(acceptance.rate)
    assert light.judged < acceptance.judged


def test_the_path_is_its_shortest_recent_round_trip() -> None:
    """A stall does not count; a link that has become slower is believed after a while."""
    measures = Measures()
    for rtt_ms in (42.0, 40.0, 400.0, 41.0):
        measures = measures.answered(rtt_ms)
    assert measures.path_ms == 40.0
    for _ in range(PATH_SAMPLES):
        measures = measures.answered(160.0)
    assert measures.path_ms == 160.0
    assert measures.answered(20.0).path_ms == 20.0


def test_a_second_in_which_a_process_was_held_changes_nothing() -> None:
    """Whatever it falls into: a gap between jobs, a draft step, a pass, a round trip."""
    usual = measured(rtt_ms=1.0, step_ms=4.0, base_ms=11.0, per_token_ms=1.0)
    held = usual.drafted(1, 1004.0, 1000.0, alone=False).passed(1, 1012.0, alone=False)
    held = held.answered(1001.0)
    pace = WherePaying()
    for measures in (usual, held):
        made = forecast(measures)
        assert made is not None
        assert pace.flow(PaceView(4, True, 1.0, made)).message


def test_a_link_that_has_become_slower_is_believed_soon() -> None:
    measures = measured(rtt_ms=1.0)
    for _ in range(15):
        measures = measures.answered(160.0)
    assert measures.rtt_ms is not None
    assert measures.rtt_ms > 100.0


def test_in_lockstep_what_drafting_ahead_cost_is_slowly_forgotten() -> None:
    measures = measured(slower_ahead=3.0)
    before = forecast(measures)
    for _ in range(60):
        measures = measures.passed(4, 80.0, alone=True)
    after = forecast(measures)
    assert before is not None
    assert after is not None
    assert after.ahead > 1.5 * before.ahead


# --- predicting -------------------------------------------------------------------------------


def test_nothing_is_predicted_before_all_has_been_measured() -> None:
    measures = Measures()
    assert forecast(measures) is None
    measures = measures.drafted(2, 40.0, 1.0, alone=True)
    assert forecast(measures) is None
    measures = measures.passed(3, 80.0, alone=True)
    assert forecast(measures) is None
    assert forecast(measures.answered(40.0)) is not None


def test_lockstep_windows_grow_with_acceptance_and_with_the_round_trip() -> None:
    assert predicted(acceptance=0.5).window < predicted(acceptance=0.9).window
    assert predicted(rtt_ms=1.0).window < predicted(rtt_ms=300.0).window


def test_the_product_is_round_trip_wait_and_verification_over_a_step() -> None:
    """The draft writes three tokens a pass, each of which waits for one pass and takes another."""
    made = predicted(rtt_ms=140.0, step_ms=20.0, base_ms=60.0, per_token_ms=0.0)
    assert made.bdp == pytest.approx((140 + 2 * 60) / (20 + 1 / made.message), rel=0.05)


@pytest.mark.parametrize("acceptance", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("rtt_ms", [0.0, 160.0])
def test_messages_grow_with_what_each_costs(acceptance: float, rtt_ms: float) -> None:
    dear = replace(measured(acceptance=acceptance, rtt_ms=rtt_ms), gap_ms=60.0)
    made = forecast(dear)
    assert made is not None
    assert made.message > predicted(acceptance=acceptance, rtt_ms=rtt_ms).message


def test_drafting_ahead_falls_short_of_the_single_chains_ceiling() -> None:
    for rtt_ms in (0.0, 40.0, 300.0):
        for acceptance in (0.5, 0.9, 0.95):
            made = predicted(rtt_ms=rtt_ms, acceptance=acceptance, per_token_ms=0.1)
            n = 1 / (1 - acceptance)
            ceiling = n / (n * 20 + rtt_ms + 60)
            assert 0.6 * ceiling < made.ahead < ceiling


def test_ahead_is_predicted_faster_where_both_overlap_and_not_where_they_share_a_core() -> None:
    apart, together = predicted(acceptance=0.9), predicted(acceptance=0.9, slower_ahead=2.5)
    assert apart.ahead > 1.2 * apart.lockstep
    assert together.ahead < together.lockstep


@given(st.floats(0.02, 0.995), st.floats(0, 1))
def test_the_last_useful_token_is_worth_its_verification(a: float, price: float) -> None:
    n = useful_ahead(a, price)
    assert n >= 1
    assert n == 1 or a**n >= RUN_SHARE * price - 1e-9
    assert a ** (n + 1) < max(RUN_SHARE * price, LEAST_CHANCE) + 1e-9


def test_less_is_drafted_ahead_where_each_token_makes_a_pass_longer() -> None:
    cheap, dear = predicted(per_token_ms=0.2), predicted(per_token_ms=8.0)
    assert cheap.useful > 2 * dear.useful


# --- paces ------------------------------------------------------------------------------------


def view(made: Forecast | None, growth: float = 1.0, **changes: Any) -> PaceView:
    plain = PaceView(window=4, ahead=False, growth=growth, forecast=made)
    return replace(plain, **changes)


AHEAD = Forecast(
    window=5, lockstep=0.01, message=2, ahead=0.02, bdp=8.0, useful=20, rescue=0.1,
    drafting_ms=8.0, alone_ms=10.0,
)  # fmt: skip


@pytest.mark.parametrize(("share", "expected"), [(1.0, 1 / 8), (0.5, 0.0), (0.0, -1 / 8)])
def test_eta_follows_the_accepted_share(share: float, expected: float) -> None:
    assert eta(share) == expected


def test_the_budget_starts_at_the_product_and_moves_around_it_within_bounds() -> None:
    budgets = [Ahead().flow(view(AHEAD, growth)).budget for growth in (0.1, 0.875, 1, 1.5, 99)]
    assert budgets == [8 * MIN_ROOM, 7, 8, 12, 8 * MAX_ROOM]
    assert not Ahead().flow(view(AHEAD)).awaits


def test_the_budget_ends_where_drafting_can_only_lose() -> None:
    assert Ahead().flow(view(replace(AHEAD, useful=6))).budget == 6


def test_lockstep_before_anything_is_known_and_where_it_is_predicted_faster() -> None:
    slow = replace(AHEAD, ahead=0.0099)
    assert Ahead().flow(view(None)).message == 4
    for made in (None, slow):
        assert Ahead().flow(view(made)).awaits
    assert Ahead().flow(view(slow)).message == 5
    assert not Ahead().flow(view(slow, ahead=True)).awaits  # a full pipeline is not drained for 1 %
    assert Ahead().flow(view(replace(AHEAD, ahead=0.008), ahead=True)).awaits


def test_the_literal_reading_starts_at_the_window() -> None:
    flows = [AheadLiterally().flow(view(AHEAD, growth)) for growth in (0.01, 1.0, 1.5)]
    assert [flow.budget for flow in flows] == [1, 4, 6]
    assert not any(flow.awaits for flow in flows)
    assert AheadLiterally().flow(view(None, window=9)).message == MAX_MESSAGE


worlds = st.fixed_dictionaries(
    {
        "rtt_ms": st.floats(0, 700), "step_ms": st.floats(0.1, 200), "base_ms": st.floats(0.1, 500),
        "per_token_ms": st.floats(0, 100), "acceptance": st.floats(0, 1),
        "slower_ahead": st.floats(0.5, 5),
    }
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(worlds, st.floats(0, 100))
def test_any_world_gives_a_flow_that_moves(world: dict[str, float], growth: float) -> None:
    made = predicted(**world)
    assert math.isfinite(made.ahead)
    assert made.ahead > 0
    assert 1 <= made.window <= MAX_LOCKSTEP_WINDOW
    flow = Ahead().flow(view(made, growth))
    assert 1 <= flow.message <= flow.budget
    if not flow.awaits:
        assert flow.message <= MAX_MESSAGE
        assert flow.budget <= max(MAX_ROOM * made.bdp + 1, made.message + 1)


def test_without_a_round_trip_a_draft_slower_than_the_target_rescues_nothing() -> None:
    measures = Measures(
        alone=Costs(step_ms=3.0, passes=PassTimes().sample(1, 2.0)),
        round_trips=(0.0,), rtt_ms=0.0, gap_ms=0.0,
    )  # fmt: skip
    found = forecast(measures)
    assert found is not None
    assert found.rescue == 1.0
