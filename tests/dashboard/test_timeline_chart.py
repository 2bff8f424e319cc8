"""The figure of one session says what the events say."""

from __future__ import annotations

from typing import Any

import pytest

from bus.store import (
    DraftSpan,
    PassSpan,
    Rollback,
    StageSpan,
    TimelineEntry,
    TimelineEvent,
    WindowSpan,
)
from dashboard.timeline_chart import CLOUD_Y, EDGE_Y, MIDDLE_Y, lanes_of, timeline_figure


def judged(
    number: int, at_ms: float, end_ms: float, outcome: str = "accepted", **facts: Any
) -> WindowSpan:
    """Of two tokens; over a link with a round trip of 40 ms, and passes of 60."""
    common = {"num_tokens": 2, "num_accepted": 1, "verify_ms": 60.0, "rtt_ms": 40.0}
    return WindowSpan(at_ms, number, end_ms=end_ms, outcome=outcome, **(common | facts))


# A round trip of 40 ms and passes of 60. Two tokens stand; of the next two the second falls, which
# makes a window in flight void, and the draft under way is interrupted after one token.
EVENTS: tuple[TimelineEvent, ...] = (
    DraftSpan(0.0, 20.0, 3, 2),
    judged(1, 20.0, 120.0, start=3, num_accepted=2, pass_tokens=3),
    DraftSpan(20.0, 40.0, 5, 2),
    judged(2, 40.0, 185.0, "partial", start=5, queue_ms=45.0, pass_tokens=2),
    DraftSpan(40.0, 60.0, 7, 2),
    WindowSpan(60.0, 3, 7, 2, 185.0, "dropped"),
    DraftSpan(176.0, 186.0, 9, 1),
    Rollback(185.0, 7),
)


def entry(*events: TimelineEvent, method: str = "plc") -> TimelineEntry:
    return TimelineEntry(
        at_ms=0, request="r", session="s", client="c", edge="e", cloud="k", method=method,
        events=events,
    )  # fmt: skip


def times(spans: Any) -> list[tuple[float, float]]:
    return [(begin, end) for begin, end, _ in spans]


def test_a_draft_is_cut_at_its_first_token_that_fell() -> None:
    lanes = lanes_of(entry(*EVENTS))
    assert times(lanes.stands) == [(0.0, 20.0), (20.0, 30.0)]
    assert times(lanes.vain) == [(30.0, 40.0), (40.0, 60.0), (176.0, 186.0)]


def test_passes_end_half_a_round_trip_before_their_feedback_arrives() -> None:
    lanes = lanes_of(entry(*EVENTS))
    assert times(lanes.passes) == [(40.0, 100.0), (105.0, 165.0)]
    assert times(lanes.up) == [(20.0, 40.0), (40.0, 60.0)]
    assert times(lanes.down) == [(100.0, 120.0), (165.0, 185.0)]


def test_a_window_nobody_judged_travels_as_long_as_others_and_comes_to_nothing() -> None:
    assert times(lanes_of(entry(*EVENTS)).up_vain) == [(60.0, 80.0)]


def test_windows_that_share_a_pass_show_it_once() -> None:
    shared = (judged(1, 0.0, 100.0, start=3, pass_tokens=2), judged(2, 10.0, 100.0, start=5))
    assert len(lanes_of(entry(*shared)).passes) == 1


def test_a_window_whose_feedback_came_with_a_later_one_is_accepted() -> None:
    events = (DraftSpan(0.0, 9.0, 3, 2), WindowSpan(9.0, 1, 3, 2, 80.0, "accepted"))
    assert times(lanes_of(entry(*events)).stands) == [(0.0, 9.0)]


def test_what_is_drafted_anew_at_the_same_place_is_not_taken_for_what_was_thrown_away() -> None:
    events = (
        DraftSpan(0.0, 10.0, 5, 1),
        DraftSpan(20.0, 30.0, 5, 1),
        judged(2, 30.0, 90.0, start=5, num_tokens=1, pass_tokens=2),
    )
    lanes = lanes_of(entry(*events))
    assert times(lanes.vain) == [(0.0, 10.0)]
    assert times(lanes.stands) == [(20.0, 30.0)]


def test_a_rejection_without_a_pass_is_a_mark_at_the_cloud() -> None:
    window = judged(1, 0.0, 40.0, "prehit_rejected", start=3, num_accepted=0, verify_ms=0.0)
    lanes = lanes_of(entry(window, Rollback(40.0, 4)))
    assert [at_ms for at_ms, _ in lanes.prehits] == [20.0]
    assert lanes.passes == ()
    assert [at_ms for at_ms, _ in lanes.rollbacks] == [40.0]


def test_passes_without_a_draft_are_the_targets_own() -> None:
    own = (PassSpan(10.0, 70.0, 1), PassSpan(70.0, 130.0, 1))
    lanes = lanes_of(entry(judged(1, 40.0, 210.0, start=5, pass_tokens=3), *own))
    assert times(lanes.own) == [(10.0, 70.0), (70.0, 130.0)]
    assert times(lanes.passes) == [(130.0, 190.0)]
    figure = timeline_figure(entry(*own))
    (bars,) = figure.data
    assert (bars.name, set(bars.y)) == ("the target writes by itself", {CLOUD_Y})
    assert figure.layout.title.text.endswith("0.1 s (measured)")


def test_feedback_left_when_the_link_says_however_long_the_window_waited() -> None:
    """A window that the text has overtaken waits long, and not on its way."""
    lanes = lanes_of(entry(judged(1, 0.0, 500.0, start=3), judged(2, 0.0, 30.0, start=5)))
    assert times(lanes.up) == [(0.0, 20.0), (0.0, 15.0)]
    assert times(lanes.down) == [(480.0, 500.0), (15.0, 30.0)]


def test_the_figure_has_three_lanes_and_a_name_for_each_thing() -> None:
    figure = timeline_figure(entry(*EVENTS))
    bars = {bar.name: (list(bar.base), list(bar.x), set(bar.y)) for bar in figure.data[:2]}
    assert bars == {
        "drafting: the token is accepted": ([0.0, 20.0], [20.0, 10.0], {EDGE_Y}),
        "drafting: the token is discarded": ([30.0, 40.0, 176.0], [10.0, 20.0, 10.0], {EDGE_Y}),
    }
    (passes,) = [trace for trace in figure.data if trace.name == "the target verifies: one pass"]
    assert set(passes.y) == {CLOUD_Y}
    assert list(figure.layout.yaxis.ticktext) == ["edge: draft", "link", "cloud: target"]
    assert "rollback" in {trace.name for trace in figure.data}
    assert all("prehit" not in trace.name for trace in figure.data), "names are for newcomers"


@pytest.mark.parametrize(
    ("method", "source", "title"),
    [
        ("sd", "measured", "One answer with sd (lossless), 0.2 s (measured)"),
        ("brand-new", "simulated", "One answer with brand-new (unknown here), 0.2 s (simulated)"),
    ],
)
def test_the_title_names_method_and_source(method: str, source: str, title: str) -> None:
    assert timeline_figure(entry(*EVENTS, method=method), source).layout.title.text == title


def test_the_page_shows_through_so_that_light_and_dark_both_work() -> None:
    layout = timeline_figure(entry(*EVENTS)).layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0, 0, 0, 0)"


def test_a_session_in_which_nothing_happened_is_an_empty_figure() -> None:
    assert len(timeline_figure(entry()).data) == 0


def test_a_middle_workers_passes_have_a_lane_of_their_own() -> None:
    stages = (StageSpan(5.0, 9.0, 4, 3, "middle-1"), StageSpan(9.0, 12.0, 1, 0, "middle-1"))
    lanes = lanes_of(entry(*EVENTS, *stages, method="pipespec"))
    assert lanes.middle == ((5.0, 9.0, "middle-1: pass over 4 tokens, 3 accepted"),)
    assert times(lanes.middle_own) == [(9.0, 12.0)]
    drawn = timeline_figure(entry(*EVENTS, *stages, method="pipespec"))
    assert {y for trace in drawn.data if "middle" in trace.name for y in trace.y} == {MIDDLE_Y}
    assert drawn.layout.yaxis.ticktext[0] == "middle: its model"
    assert drawn.layout.yaxis.range[1] > MIDDLE_Y
    assert MIDDLE_Y not in timeline_figure(entry(*EVENTS)).layout.yaxis.tickvals


def test_passes_over_trees_have_a_trace_of_their_own() -> None:
    made = entry(PassSpan(0.0, 10.0, 1), PassSpan(10.0, 22.0, 9, 8, 3, 2), method="medusa")
    lanes = lanes_of(made)
    assert times(lanes.own) == [(0.0, 10.0)]
    assert lanes.trees == (
        (10.0, 22.0, "pass over a tree of 8 proposed tokens, depth 3: 2 accepted"),
    )
    names = [trace.name for trace in timeline_figure(made).data]
    assert "the target verifies a tree of its speculator" in names
