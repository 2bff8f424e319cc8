from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding.timing import INITIAL_TIMEOUT_MS, MAX_TIMEOUT_MS, MIN_TIMEOUT_MS, ReplyTimer


def test_before_any_reply_the_initial_timeout_doubles_up_to_the_longest() -> None:
    timeouts = [ReplyTimer().timeout_ms(n) for n in (1, 2, 3, 4, 50)]
    assert timeouts == [INITIAL_TIMEOUT_MS, 2000, 4000, MAX_TIMEOUT_MS, MAX_TIMEOUT_MS]


def test_the_first_reply_counts_in_full_and_half_of_it_as_variation() -> None:
    timer = ReplyTimer().sample(100.0)
    assert (timer.smoothed_ms, timer.variation_ms) == (100.0, 50.0)
    assert timer.timeout_ms(1) == 300.0


def test_later_replies_are_smoothed_as_in_rfc_6298() -> None:
    timer = ReplyTimer().sample(100.0).sample(180.0)
    assert timer.variation_ms == 0.75 * 50 + 0.25 * 80  # against the estimate before this reply
    assert timer.smoothed_ms == 0.875 * 100 + 0.125 * 180
    assert timer.timeout_ms(1) == timer.smoothed_ms + 4 * timer.variation_ms
    assert timer.timeout_ms(2) == 2 * timer.timeout_ms(1)
    again = timer.sample(20.0)
    assert again.variation_ms == 0.75 * 57.5 + 0.25 * 90
    assert again.smoothed_ms == 0.875 * 110 + 0.125 * 20


def test_replies_within_the_blink_of_an_eye_do_not_make_a_hasty_timer() -> None:
    timer = ReplyTimer()
    for _ in range(100):
        timer = timer.sample(1.0)
    assert timer.timeout_ms(1) == MIN_TIMEOUT_MS
    assert timer.timeout_ms(2) == 2 * MIN_TIMEOUT_MS


def test_patience_that_was_needed_stays_until_a_reply_comes_in_time() -> None:
    """Else a reply slower than the first timeout would never be measured."""
    timer = ReplyTimer().answered_late(3)
    assert timer.timeout_ms(1) == 4 * INITIAL_TIMEOUT_MS
    assert timer.answered_late(2).timeout_ms(1) == 4 * INITIAL_TIMEOUT_MS
    timer = timer.sample(3500.0)
    assert (timer.backoff, timer.smoothed_ms, timer.variation_ms) == (0, 3500.0, 1750.0)
    assert ReplyTimer().sample(100.0).answered_late(2).sample(100.0).timeout_ms(1) < 300.0


@given(st.lists(st.floats(0, 1e7), max_size=20), st.integers(1, 60))
def test_timeouts_stay_within_their_bounds_and_never_shrink(
    replies: list[float], sends: int
) -> None:
    timer = ReplyTimer()
    for reply_ms in replies:
        timer = timer.sample(reply_ms)
    assert MIN_TIMEOUT_MS <= timer.timeout_ms(sends) <= timer.timeout_ms(sends + 1)
    assert timer.timeout_ms(sends) <= MAX_TIMEOUT_MS


@pytest.mark.parametrize("steady", [300.0, 800.0])
def test_a_steady_link_ends_with_a_timeout_just_above_its_reply_time(steady: float) -> None:
    timer = ReplyTimer()
    for _ in range(100):
        timer = timer.sample(steady)
    assert steady <= timer.timeout_ms(1) < 1.01 * steady
