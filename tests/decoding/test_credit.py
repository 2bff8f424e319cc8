"""The law of credit inertia: hand-computed cases, and what must hold whatever is reported."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.control import ControlState
from decoding.credit import Advice, ConstantPredictor, CreditLaw, neutral_acceptance

FLAT = CreditLaw(neutral=lambda _: 0.6, band=0.0, hold=0, alarm=9.0)
"""τ = 0.6 for every window, and no calm."""


def run(law: CreditLaw, shares: list[float], window: int = 4) -> ControlState:
    """The state after windows with these p_acc."""
    state = law.initial()
    for share in shares:
        state = law.after(state, share * window, window)
    return state


# --- formulas, by hand ------------------------------------------------------------------------


def test_neutral_acceptance_falls_with_the_window_and_is_0_6_for_four() -> None:
    assert neutral_acceptance(1) == pytest.approx(0.806)
    assert neutral_acceptance(2) == pytest.approx((0.806 + 0.806**2) / 2)
    assert neutral_acceptance(4) == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize(
    ("shares", "credit"),
    [
        ([], 0.6),
        ([1.0], 0.7 * 0.6 + 0.3 * 1.0),  # 0.72
        ([1.0, 0.5], 0.7 * 0.72 + 0.3 * 0.5),  # 0.654
        ([1.0, 0.5, 0.25], 0.7 * 0.654 + 0.3 * 0.25),  # 0.5328
        ([0.6] * 3, 0.6),
        ([0.0], 0.42),
    ],
)
def test_credit_is_the_exponential_average_from_neutral_on(
    shares: list[float], credit: float
) -> None:
    """r̂_t = 0.7·r̂_{t−1} + 0.3·p_acc(t) (docs/method.md, Credit)."""
    assert run(FLAT, shares).credit == pytest.approx(credit, abs=1e-12)


def test_credit_delta_is_the_last_change() -> None:
    assert run(FLAT, [1.0]).credit_delta == pytest.approx(0.12)
    assert run(FLAT, [1.0, 0.5]).credit_delta == pytest.approx(0.654 - 0.72)


def test_windows_older_than_the_memory_have_no_say() -> None:
    assert run(FLAT, [0.0, *[1.0] * 5]).credit == pytest.approx(run(FLAT, [1.0] * 5).credit)
    latest = replace(FLAT, memory=1, smoothing=1.0)
    assert run(latest, [1.0, 0.25]).credit == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("shares", "omega", "threshold"),
    [
        ([], 1.0, 0.15),
        ([1.0], 1.0, 0.15 + 0.12),  # r̂ = 0.72
        ([1.0], 0.5, 0.15 + 0.06),
        ([1.0] * 4, 1.0, 0.30),  # 0.15 + 0.304, clipped
        ([0.5], 2.0, 0.15 - 0.06),
        ([0.0] * 3, 1.0, 0.02),  # 0.15 − 0.394, clipped
    ],
)
def test_the_threshold_moves_with_credit_within_its_bounds(
    shares: list[float], omega: float, threshold: float
) -> None:
    """T = clip(T_base + α_s·ω·(r̂ − τ), T_min, T_max) (docs/method.md)."""
    law = replace(FLAT, predictor=ConstantPredictor(Advice(omega, 6)))
    state = run(law, shares)
    assert state.threshold == pytest.approx(threshold, abs=1e-12)
    assert state.window == 6


def test_an_excess_is_measured_against_windows_of_the_same_size() -> None:
    law = CreditLaw(band=0.0, hold=0)
    for window in (1, 2, 4):
        state = law.after(law.initial(), neutral_acceptance(window) * window, window)
        assert state.credit == pytest.approx(law.initial().credit)


# --- calm, alarm, safety ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "held", "moves"),
    [(0.6, 5, False), (0.62, 5, False), (0.64, 5, True), (0.64, 0, False), (0.64, 1, True)],
)
def test_small_and_hasty_changes_are_not_made(share: float, held: int, moves: bool) -> None:
    """r̂ − τ is 0, 0.006 and 0.012; the band is 0.01; two windows lie between changes."""
    law = replace(FLAT, band=0.01, hold=2)
    state = law.after(replace(law.initial(), held=held), 4 * share, 4)
    assert (state.threshold != law.base) is moves
    assert state.held == (0 if moves else held + 1)


def test_a_sudden_drop_empties_the_memory_at_once() -> None:
    """r̂ = 0.93 after eight good windows; 0.93 − 0.1 − 0.25 = 0.58 < 0.75, then the alarm."""
    law = replace(FLAT, alarm=0.75, hold=3)
    good = run(law, [1.0] * 8)
    assert good.threshold == law.most
    once = law.after(good, 4 * 0.1, 4)
    assert once.drop == pytest.approx(good.credit - 0.1 - 0.25)
    twice = law.after(once, 4 * 0.1, 4)
    assert (twice.credit, twice.threshold, twice.history) == (0.6, law.base, ())
    slow = replace(law, alarm=9.0)
    assert slow.after(slow.after(good, 0.4, 4), 0.4, 4).history != ()


def test_one_bad_window_is_no_alarm_and_low_credit_does_not_fall_further() -> None:
    law = replace(FLAT, alarm=0.75)
    assert run(law, [1.0] * 8 + [0.0] + [1.0] * 2).history != ()
    assert run(law, [0.3] * 8 + [0.0] * 8).history != ()


def test_no_threshold_is_beyond_what_is_safe_and_the_conservative_one_where_none_is() -> None:
    law = replace(FLAT, safe=lambda credit: 0.2)
    assert run(law, [0.6]).threshold == 0.15
    assert run(law, [1.0] * 3).threshold == 0.2
    assert run(replace(law, safe=lambda credit: 0.0), [1.0] * 3).threshold == 0.02


def test_a_client_with_a_history_begins_with_its_credit() -> None:
    end = run(FLAT, [1.0, 0.9])
    begin = FLAT.initial(end.history)
    assert (begin.credit, begin.threshold) == (end.credit, end.threshold)
    assert begin.version == 1


# --- whatever is reported ---------------------------------------------------------------------

shares = st.floats(0, 1)
laws = st.builds(
    CreditLaw,
    gain=st.floats(0.1, 3),
    smoothing=st.floats(0.05, 1),
    memory=st.integers(1, 12),
    band=st.floats(0, 0.05),
    hold=st.integers(0, 5),
    alarm=st.floats(0.3, 2),
    predictor=st.builds(
        ConstantPredictor, st.builds(Advice, st.floats(0.1, 4), st.integers(1, 32))
    ),
)


@settings(max_examples=80, deadline=None)
@given(law=laws, series=st.lists(st.tuples(shares, st.integers(1, 8)), max_size=30))
def test_everything_stays_bounded(law: CreditLaw, series: list[tuple[float, int]]) -> None:
    state = law.initial()
    for share, window in series:
        state = law.after(state, share * window, window)
        assert law.least <= state.threshold <= law.most
        assert 0.0 <= state.credit <= 1.0
        assert -1.0 <= state.credit_delta <= 1.0
        assert len(state.history) <= law.memory


@settings(max_examples=80, deadline=None)
@given(law=laws, series=st.lists(shares, min_size=1, max_size=12), at=st.integers(0, 11), up=shares)
def test_a_better_window_never_lowers_credit_nor_the_threshold_it_asks_for(
    law: CreditLaw, series: list[float], at: int, up: float
) -> None:
    law = replace(law, alarm=1e9)
    better = list(series)
    better[at % len(series)] = max(better[at % len(series)], up)
    worse, after = run(law, series), run(law, better)
    assert after.credit >= worse.credit - 1e-12
    omega = law.predictor(0.5, 0.0).omega
    wanted = [law.threshold(law.excess_credit(s.history), s.credit, omega) for s in (worse, after)]
    assert wanted[1] >= wanted[0] - 1e-12


@settings(max_examples=100, deadline=None)
@given(law=laws, before=st.lists(shares, max_size=10), share=shares)
def test_a_constant_input_comes_to_rest(law: CreditLaw, before: list[float], share: float) -> None:
    state = run(law, before)
    for _ in range(4 * law.memory + law.hold + 8):
        state = law.after(state, share * 4, 4)
    settled = state.threshold
    for _ in range(10):
        state = law.after(state, share * 4, 4)
        assert state.threshold == settled


@settings(max_examples=80, deadline=None)
@given(law=laws, series=st.lists(shares, min_size=1, max_size=20))
def test_a_bounded_change_of_credit_makes_a_bounded_change_of_the_threshold(
    law: CreditLaw, series: list[float]
) -> None:
    """|ΔT| between two changes ≤ α_s·ω·|Δ(r̂ − τ)| between them: Theorem 4.1's premise."""
    law = replace(law, alarm=1e9)
    omega = law.predictor(0.5, 0.0).omega
    state = law.initial()
    at_change = law.excess_credit(state.history)
    for share in series:
        new = law.after(state, share * 4, 4)
        if new.threshold != state.threshold:
            excess = law.excess_credit(new.history)
            step = law.gain * omega * abs(excess - at_change)
            assert abs(new.threshold - state.threshold) <= step + 1e-12
            at_change = excess
        state = new


@settings(max_examples=60, deadline=None)
@given(law=laws, rate=shares)
def test_in_closed_loop_it_does_not_latch_at_a_bound(law: CreditLaw, rate: float) -> None:
    """Credit is of E[L_acc], which no threshold raises: after any beginning, the same text leads
    to the same threshold."""
    ends, state = list[float](), law.initial()
    for begin in (0.0, 1.0):
        state = run(law, [begin] * 10)
        for _ in range(4 * law.memory + law.hold + 8):
            state = law.after(state, rate * 4, 4)
        ends.append(state.threshold)
    wanted = law.threshold(
        law.excess_credit(state.history), state.credit, law.predictor(0, 0).omega
    )
    assert all(abs(end - wanted) <= law.band + 1e-9 for end in ends)
