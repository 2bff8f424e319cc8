"""When a session drafted, what was in flight, and the shares made of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.protocol.messages import Feedback, Outcome
from bus.store import DraftSpan, Rollback, WindowSpan
from decoding.edge_events import WindowJudged
from edge_worker.timeline import Shares, Timeline
from tests.edge_worker.test_usage import window


def judged(
    seq: int, at_ms: float, outcome: Outcome = Outcome.ACCEPTED, **changes: Any
) -> WindowJudged:
    """Of epoch 0: 10 ms in the target, 2 ms waiting."""
    stands = outcome is Outcome.ACCEPTED
    feedback = Feedback(
        "s1", 1, 0, seq, 9, outcome, 4 if stands else 1, None if stands else 8, 0.1,
        changes.pop("verify_ms", 10.0), 2.0, changes.pop("pass_tokens", 4),
    )  # fmt: skip
    committed = 4 if stands else 2
    return WindowJudged(feedback, 4, committed, not stands, 4, 0.5, 8, 6, 6.0, 9.0, at_ms)


def lockstep() -> Timeline:
    """Drafting 0 … 20, in flight 20 … 50 with 10 ms of verification, twice."""
    timeline = Timeline(1000.0)
    for seq, at_ms in ((0, 1000.0), (1, 1050.0)):
        timeline.drafted(3 + 4 * seq, 4, 20.0, at_ms + 20)
        timeline.sent(window(epoch=0, seq=seq), at_ms + 20)
        timeline.judged(judged(seq, at_ms + 50))
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
    timeline.sent(window(epoch=0, seq=2), 1090.0)
    timeline.judged(judged(2, 1100.0, pass_tokens=0))
    assert timeline.shares().cloud_idle == pytest.approx(0.8)


def test_a_rollback_drops_what_was_in_flight_behind_it() -> None:
    timeline = Timeline(1000.0)
    for seq in range(3):
        timeline.sent(window(epoch=0, seq=seq), 1010.0 + seq)
    timeline.sent(window(epoch=1, seq=1), 1014.0)
    timeline.judged(judged(1, 1040.0, Outcome.PARTIAL))
    assert timeline.events() == (
        WindowSpan(10.0, 0, 0, 5, 4, 40.0, "accepted"),
        WindowSpan(11.0, 0, 1, 5, 4, 40.0, "partial", 1, 10.0, 2.0, 4),
        WindowSpan(12.0, 0, 2, 5, 4, 40.0, "dropped"),
        Rollback(40.0, 9),
    )


def test_a_window_sent_again_is_in_flight_since_the_first_time() -> None:
    timeline = Timeline(0.0)
    timeline.sent(window(epoch=0, seq=0), 10.0)
    timeline.sent(window(epoch=0, seq=0), 500.0)
    timeline.judged(judged(0, 520.0))
    (event,) = timeline.events()
    assert (event.at_ms, isinstance(event, WindowSpan)) == (10.0, True)


def test_before_the_first_verdict_there_are_no_shares() -> None:
    timeline = Timeline(0.0)
    timeline.drafted(3, 4, 5.0, 10.0)
    assert timeline.shares() == Shares()
    assert timeline.events() == (DraftSpan(5.0, 10.0, 3, 4),)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50)), min_size=1, max_size=20))
def test_shares_are_shares(spans: list[tuple[float, float]]) -> None:
    timeline, clock = Timeline(0.0), 0.0
    for seq, (gap_ms, draft_ms) in enumerate(spans):
        clock += gap_ms + draft_ms
        timeline.drafted(3, 4, draft_ms, clock)
        timeline.sent(window(epoch=0, seq=seq), clock)
        if seq:
            timeline.judged(judged(seq - 1, clock))
    shares = timeline.shares()
    assert all(0 <= s <= 1 for s in (shares.edge_idle, shares.cloud_idle, shares.hidden))
