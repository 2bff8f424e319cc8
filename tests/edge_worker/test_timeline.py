"""When a session drafted, what was in flight, and the shares made of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.protocol.messages import Outcome
from bus.store import DraftSpan, PassSpan, Rollback, WindowSpan
from decoding.edge_events import WindowJudged
from edge_worker.timeline import Shares, Timeline
from tests.edge_worker import test_usage as usage
from tests.edge_worker.test_usage import own, window


def judged(
    number: int, at_ms: float, outcome: Outcome = Outcome.ACCEPTED, **changes: Any
) -> WindowJudged:
    """Of four tokens: 10 ms in the target, 2 ms waiting."""
    stands = outcome is Outcome.ACCEPTED
    facts = {"queue_ms": 2.0, "pass_tokens": 4, "at_ms": at_ms, "outcome": outcome}
    return usage.judged(4, 4 if stands else 1, not stands, number=number, **(facts | changes))


def lockstep() -> Timeline:
    """Drafting 0 … 20, in flight 20 … 50 with 10 ms of verification, twice."""
    timeline = Timeline(1000.0)
    for number, at_ms in ((1, 1000.0), (2, 1050.0)):
        timeline.drafted(3 + 4 * number, 4, 20.0, at_ms + 20)
        timeline.sent(window(number), at_ms + 20)
        timeline.judged(judged(number, at_ms + 50))
    return timeline


def test_in_lockstep_nothing_of_the_round_trip_is_hidden() -> None:
    shares = lockstep().shares()
    assert shares.hidden == 0.0
    assert shares.edge_idle == pytest.approx(0.6)
    assert shares.cloud_idle == pytest.approx(0.8)


def test_drafting_on_hides_the_part_it_drafts() -> None:
    timeline = lockstep()
    timeline.drafted(11, 4, 15.0, 1040.0)  # 25 … 40, while the first window is in flight
    shares = timeline.shares()
    assert shares.hidden == pytest.approx(15 / 60)
    assert shares.edge_idle == pytest.approx(0.45)


def test_windows_that_shared_a_pass_count_its_time_once() -> None:
    timeline = lockstep()
    timeline.sent(window(3), 1090.0)
    timeline.judged(judged(3, 1100.0, pass_tokens=0))
    assert timeline.shares().cloud_idle == pytest.approx(0.8)


def test_a_rollback_drops_what_was_in_flight_behind_it() -> None:
    timeline = Timeline(1000.0)
    for number in (1, 2, 3):
        timeline.sent(window(number), 1010.0 + number)
    timeline.judged(judged(1, 1040.0))
    timeline.judged(judged(2, 1040.0, Outcome.PARTIAL, pass_tokens=0))
    assert timeline.events() == (
        WindowSpan(11.0, 1, 5, 4, 40.0, "accepted", 4, 10.0, 2.0, 4, 9.0),
        WindowSpan(12.0, 2, 5, 4, 40.0, "partial", 1, 10.0, 2.0, 0, 9.0),
        WindowSpan(13.0, 3, 5, 4, 40.0, "dropped"),
        Rollback(40.0, 9),
    )


def test_a_window_sent_again_is_in_flight_since_the_first_time() -> None:
    timeline = Timeline(0.0)
    timeline.sent(window(1), 10.0)
    timeline.sent(window(1), 500.0)
    timeline.judged(judged(1, 520.0))
    (event,) = timeline.events()
    assert (event.at_ms, isinstance(event, WindowSpan)) == (10.0, True)


def test_passes_without_a_draft_end_half_a_round_trip_before_their_feedback() -> None:
    timeline = Timeline(1000.0)
    for at_ms in (1030.0, 1040.0, 1050.0):
        timeline.judged(own(at_ms, rtt_ms=40.0))
    timeline.judged(own(1060.0, rtt_ms=40.0, pass_tokens=0))  # text that was sent again
    assert timeline.events() == (
        PassSpan(0.0, 10.0, 1), PassSpan(10.0, 20.0, 1), PassSpan(20.0, 30.0, 1),
    )  # fmt: skip
    shares = timeline.shares()
    assert (shares.edge_idle, shares.hidden) == (1.0, 0.0)
    assert shares.cloud_idle == pytest.approx(0.0)


def test_a_pass_begins_no_earlier_than_its_session() -> None:
    timeline = Timeline(1000.0)
    timeline.judged(own(1012.0, rtt_ms=40.0))
    assert timeline.events() == (PassSpan(0.0, 10.0, 1),)


def test_passes_with_and_without_a_draft_are_the_targets_time() -> None:
    """100 ms in which it verifies for 20 and writes by itself for 20."""
    timeline = lockstep()
    for at_ms in (1055.0, 1065.0):
        timeline.judged(own(at_ms))
    shares = timeline.shares()
    assert shares.cloud_idle == pytest.approx(0.6)
    assert shares.edge_idle == pytest.approx(0.6)


def test_before_the_first_feedback_there_are_no_shares() -> None:
    timeline = Timeline(0.0)
    timeline.drafted(3, 4, 5.0, 10.0)
    assert timeline.shares() == Shares()
    assert timeline.events() == (DraftSpan(5.0, 10.0, 3, 4),)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50)), min_size=1, max_size=20))
def test_shares_are_shares(spans: list[tuple[float, float]]) -> None:
    timeline, clock = Timeline(0.0), 0.0
    for number, (gap_ms, draft_ms) in enumerate(spans, 1):
        clock += gap_ms + draft_ms
        timeline.drafted(3, 4, draft_ms, clock)
        timeline.sent(window(number), clock)
        timeline.judged(judged(number - 1, clock) if number % 2 else own(clock))
    shares = timeline.shares()
    assert all(0 <= s <= 1 for s in (shares.edge_idle, shares.cloud_idle, shares.hidden))
