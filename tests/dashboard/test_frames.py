"""Counts are folded and binned without losing or inventing windows."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.frames import BIN_S, COUNTS, Span, Totals, Traffic, binned

windows = st.tuples(
    st.integers(1_000, 1_400),
    st.sampled_from(["edge-1", "edge-2", "edge-10"]),
    st.sampled_from(["sd", "e2sci"]),
    st.integers(0, 8),
    st.integers(0, 8),
    st.integers(0, 9),
    st.booleans(),
)


def traffic_of(*rows: tuple[int, str, str, int, int, int, bool]) -> Traffic:
    traffic = Traffic()
    for at_s, edge, method, drafted, accepted, committed, rollback in rows:
        traffic.add(
            at_s,
            edge,
            method,
            drafted=drafted,
            accepted=accepted,
            committed=committed,
            rollback=rollback,
        )
    return traffic


@given(st.lists(windows, max_size=60), st.sampled_from([None, "edge", "method"]))
def test_binning_keeps_every_count(
    rows: list[tuple[int, str, str, int, int, int, bool]], by: str | None
) -> None:
    span = Span(1_000, 1_500, 5)
    table = binned(traffic_of(*rows).frame(0, 2_000), span, by)
    assert table["windows"].sum() == len(rows)
    assert table["drafted"].sum() == sum(row[3] for row in rows)
    assert table["committed"].sum() == sum(row[5] for row in rows)
    assert table["rollbacks"].sum() == sum(row[6] for row in rows)


def test_silence_is_zero_and_every_group_has_every_bin() -> None:
    traffic = traffic_of((100, "a", "sd", 4, 4, 5, False), (109, "b", "sd", 4, 1, 2, True))
    table = binned(traffic.frame(0, 200), Span(100, 110, 5), by="edge")
    assert list(table.itertuples(index=False, name=None)) == [
        (pd.Timestamp(100, unit="s", tz="UTC"), "a", 1, 4, 4, 5, 0, 0, 0, 0, 0, 0),
        (pd.Timestamp(100, unit="s", tz="UTC"), "b", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        (pd.Timestamp(105, unit="s", tz="UTC"), "a", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        (pd.Timestamp(105, unit="s", tz="UTC"), "b", 1, 4, 1, 2, 1, 0, 0, 0, 0, 0),
    ]


def test_no_traffic_gives_an_empty_frame_with_its_columns() -> None:
    table = binned(Traffic().frame(0, 100), Span(0, 100, 5), by="edge")
    assert list(table.columns) == ["at", "edge", *COUNTS]
    assert table.empty


def test_frame_takes_only_its_range_and_forgetting_frees_the_rest() -> None:
    traffic = traffic_of((10, "a", "sd", 1, 1, 1, False), (20, "a", "sd", 2, 2, 2, False))
    assert traffic.frame(10, 20)["drafted"].tolist() == [1]
    traffic.forget_before(20)
    assert traffic.frame(0, 100)["drafted"].tolist() == [2]


@pytest.mark.parametrize("length_s", BIN_S)
def test_span_has_whole_bins_and_leaves_the_unfinished_one_out(length_s: int) -> None:
    span = Span.ending_at(1_000_007.9, length_s)
    assert span.end_s - span.start_s == length_s
    assert span.start_s % span.bin_s == span.end_s % span.bin_s == 0
    assert span.end_s <= 1_000_007.9 < span.end_s + span.bin_s


def test_span_begins_where_the_record_does() -> None:
    span = Span(100, 200, 5)
    assert span.clipped(0) == span
    assert span.clipped(121.5) == Span(125, 200, 5)
    assert span.clipped(500) == Span(200, 200, 5)


def test_totals_and_their_rates() -> None:
    traffic = traffic_of(
        (99, "a", "sd", 9, 9, 9, True),
        (100, "a", "sd", 4, 3, 4, True),
        (101, "b", "sd", 4, 4, 5, False),
    )
    totals = Totals.of(traffic.frame(0, 200), 100, 130)
    assert totals == Totals(2, 8, 7, 9, 1, seconds=30)
    assert totals.goodput == pytest.approx(0.3)
    assert totals.acceptance == pytest.approx(7 / 8)
    assert totals.rollbacks_per_min == pytest.approx(2)
    assert totals.rollback_share == pytest.approx(0.5)


def test_totals_of_nothing_have_no_ratios() -> None:
    totals = Totals.of(Traffic().frame(0, 10), 0, 0)
    assert totals.goodput is totals.acceptance is totals.rollback_share is None
    assert totals.rollbacks_per_min is None
