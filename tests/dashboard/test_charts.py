"""Figures say what the frame says: values, units, gaps, names."""

from __future__ import annotations

import math
from datetime import UTC, timedelta, timezone
from types import SimpleNamespace

import pandas as pd
import pytest

from dashboard import charts
from dashboard.frames import Span, Traffic
from tests.dashboard.test_frames import traffic_of

SPAN = Span(100, 110, 5)
TRAFFIC = traffic_of(
    (100, "edge-1", "sd", 8, 6, 10, True),
    (101, "edge-2", "sd", 8, 8, 20, False),
    (106, "edge-1", "sd", 0, 0, 5, False),
).frame(0, 1_000)


def test_goodput_is_tokens_per_second_per_edge_and_in_total() -> None:
    lines = {trace.name: list(trace.y) for trace in charts.goodput(TRAFFIC, SPAN, UTC).data}
    assert lines == {"edge-1": [2.0, 1.0], "edge-2": [4.0, 0.0], "total": [6.0, 1.0]}


def test_goodput_of_one_edge_needs_no_total() -> None:
    one = TRAFFIC[TRAFFIC["edge"] == "edge-1"]
    assert [trace.name for trace in charts.goodput(one, SPAN, UTC).data] == ["edge-1"]


def test_many_edges_fold_into_one_band_and_the_total_stays() -> None:
    rows = [(100, f"edge-{n}", "sd", 4, 4, n, False) for n in range(1, 21)]
    figure = charts.goodput(traffic_of(*rows).frame(0, 1_000), SPAN, UTC)
    lines = {trace.name: list(trace.y) for trace in figure.data}
    assert len(lines) == charts.MAX_EDGES_SHOWN + 1
    assert "edge-20" in lines
    assert "edge-1" not in lines
    assert lines["total"] == [sum(range(1, 21)) / 5, 0.0]
    bands = [values[0] for name, values in lines.items() if name != "total"]
    assert sum(bands) == pytest.approx(lines["total"][0])


def test_acceptance_is_a_share_and_a_gap_where_nothing_was_drafted() -> None:
    (line,) = charts.acceptance(TRAFFIC, SPAN, UTC).data
    assert line.y[0] == pytest.approx(14 / 16)
    assert math.isnan(line.y[1])
    assert line.name == "sd (lossless)"


def test_a_lossy_method_says_so_wherever_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lossy = SimpleNamespace(lossless=False)
    monkeypatch.setattr("decoding.methods.find", {"quick": lossy}.get)
    traffic = traffic_of((100, "edge-1", "quick", 4, 4, 4, False)).frame(0, 1_000)
    (line,) = charts.acceptance(traffic, SPAN, UTC).data
    assert line.name == "quick (lossy)"


def test_time_before_the_record_stays_empty() -> None:
    figure = charts.goodput(TRAFFIC, SPAN, UTC, since_s=101)
    lines = {trace.name: list(trace.y) for trace in figure.data}
    assert lines == {"edge-1": [1.0]}


def test_an_unknown_method_is_never_called_lossless() -> None:
    assert charts.method_label("sd") == "sd (lossless)"
    assert charts.method_label("brand-new") == "brand-new (unknown here)"


def test_rollbacks_per_minute_and_as_share_of_windows() -> None:
    (bars,) = charts.rollbacks(TRAFFIC, SPAN, UTC).data
    assert list(bars.y) == [12.0, 0.0]
    (line,) = charts.rollback_share(TRAFFIC, SPAN, UTC).data
    assert list(line.y) == [0.5, 0.0]


@pytest.mark.parametrize(
    "draw", [charts.goodput, charts.acceptance, charts.rollbacks, charts.rollback_share]
)
def test_every_chart_has_a_unit_the_whole_span_and_the_viewers_clock(draw) -> None:  # type: ignore[no-untyped-def]
    zone = timezone(timedelta(hours=2))
    figure = draw(TRAFFIC, SPAN, zone)
    assert figure.layout.yaxis.title.text
    shown = [pd.Timestamp(at) for at in (*figure.layout.xaxis.range, figure.data[0].x[0])]
    assert shown == [
        pd.Timestamp("1970-01-01 02:01:40"),
        pd.Timestamp("1970-01-01 02:01:50"),
        pd.Timestamp("1970-01-01 02:01:42.5"),
    ]


@pytest.mark.parametrize(
    "draw", [charts.goodput, charts.acceptance, charts.rollbacks, charts.rollback_share]
)
def test_no_traffic_draws_empty_axes(draw) -> None:  # type: ignore[no-untyped-def]
    figure = draw(TRAFFIC.iloc[:0], SPAN, UTC)
    assert all(len(trace.y) == 0 for trace in figure.data)


def test_credit_and_threshold_are_means_of_the_windows_that_have_them() -> None:
    traffic = Traffic()
    for method, credit, threshold in (("sd", None, None), ("e2sci", 0.6, 0.1), ("e2sci", 0.8, 0.3)):
        traffic.add(
            100, "edge-1", method, drafted=4, accepted=4, committed=5, rollback=False,
            in_flight=8 if method == "sd" else 2, credit=credit, threshold=threshold,
        )  # fmt: skip
    frame = traffic.frame(0, 1_000)
    credit_line, threshold_line = charts.steering(frame, SPAN, UTC).data
    assert credit_line.y[0] == pytest.approx(0.7)
    assert threshold_line.y[0] == pytest.approx(0.2)
    assert math.isnan(threshold_line.y[1])
    flying = {line.name: line.y[0] for line in charts.in_flight(frame, SPAN, UTC).data}
    assert flying == {"sd (lossless)": 8.0, "e2sci (lossy)": 2.0}
