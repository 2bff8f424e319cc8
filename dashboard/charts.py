"""Plotly figures from traffic frames. Pure: the same frame gives the same figure.

Knows how a chart looks, not where numbers come from. All take `traffic` (columns
`frames.TRAFFIC_COLUMNS`), the `span` to show, the viewer's time zone, and `since_s`, before which
nothing is known: there the chart stays empty, while silence after it is drawn as zero. Colours are
left to the theme, so that light and dark both work; the exception is the total's neutral grey,
legible on either.
"""

from __future__ import annotations

from datetime import datetime, tzinfo
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from dashboard.frames import COUNTS, Span, binned
from decoding import methods

MAX_EDGES_SHOWN = 6
OTHER_EDGES = "other edges"
_TOTAL_GREY = "#8a8f98"
_HEIGHT_PX = 260

_MINUTE_MS = 60_000
_CLOCK = [
    {"dtickrange": [None, _MINUTE_MS - 1], "value": "%H:%M:%S"},
    {"dtickrange": [_MINUTE_MS, None], "value": "%H:%M"},
]
"""Seconds only where ticks are closer than a minute, also after zooming in."""

Trace = dict[str, Any]
"""One plotly trace, as plotly's own JSON names its parts."""

_SHARE_LINE: Trace = {"type": "scatter", "mode": "lines+markers", "marker": {"size": 4}}


def method_label(name: str) -> str:
    """The method's name with what it promises: `sd (lossless)`, `… (lossy)`.

    A method this release does not know is not called lossless.
    """
    method = methods.find(name)
    if method is None:
        return f"{name} (unknown here)"
    return f"{name} ({'lossless' if method.lossless else 'lossy'})"


def goodput(traffic: pd.DataFrame, span: Span, zone: tzinfo, since_s: float = 0.0) -> go.Figure:
    """Committed tokens per second: one band per edge, their upper rim is the total."""
    per_edge = binned(_grouped_edges(traffic), span.clipped(since_s), by="edge")
    traces: list[Trace] = [
        {
            "type": "scatter",
            "x": _middles(rows["at"], span, zone),
            "y": rows["committed"] / span.bin_s,
            "name": str(edge),
            "mode": "lines",
            "line": {"width": 1},
            "stackgroup": "edges",
            "hovertemplate": "%{y:.1f} tok/s",
        }
        for edge, rows in per_edge.groupby("edge", sort=False)
    ]
    if len(traces) > 1:
        total = per_edge.groupby("at", sort=True)["committed"].sum() / span.bin_s
        traces.append(
            {
                "type": "scatter",
                "x": _middles(total.index.to_series(), span, zone),
                "y": total,
                "name": "total",
                "mode": "lines",
                "line": {"color": _TOTAL_GREY, "width": 2},
                "hovertemplate": "%{y:.1f} tok/s",
            }
        )
    return _figure(traces, span, zone, "tokens per second")


def acceptance(traffic: pd.DataFrame, span: Span, zone: tzinfo, since_s: float = 0.0) -> go.Figure:
    """Accepted ÷ drafted, one line per method; a gap where nothing was drafted."""
    per_method = binned(traffic, span.clipped(since_s), by="method")
    traces: list[Trace] = [
        {
            **_SHARE_LINE,
            "x": _middles(rows["at"], span, zone),
            "y": _ratio(rows["accepted"], rows["drafted"]),
            "name": method_label(str(name)),
            "hovertemplate": "%{y:.0%} of drafted",
        }
        for name, rows in per_method.groupby("method", sort=False)
    ]
    return _figure(traces, span, zone, "accepted of drafted", share=True)


def rollbacks(traffic: pd.DataFrame, span: Span, zone: tzinfo, since_s: float = 0.0) -> go.Figure:
    """Rollbacks per minute, all edges together."""
    table = binned(traffic, span.clipped(since_s))
    bars: Trace = {
        "type": "bar",
        "x": _middles(table["at"], span, zone),
        "y": table["rollbacks"] * 60 / span.bin_s,
        "name": "rollbacks",
        "hovertemplate": "%{y:.0f} per minute",
    }
    return _figure([bars], span, zone, "rollbacks per minute", legend=False)


def rollback_share(
    traffic: pd.DataFrame, span: Span, zone: tzinfo, since_s: float = 0.0
) -> go.Figure:
    """The share of windows that ended in a rollback; a gap where there were no windows."""
    table = binned(traffic, span.clipped(since_s))
    line: Trace = {
        **_SHARE_LINE,
        "x": _middles(table["at"], span, zone),
        "y": _ratio(table["rollbacks"], table["windows"]),
        "name": "rolled back",
        "hovertemplate": "%{y:.0%} of windows",
    }
    return _figure([line], span, zone, "share of windows", share=True, legend=False)


def steering(traffic: pd.DataFrame, span: Span, zone: tzinfo, since_s: float = 0.0) -> go.Figure:
    """Mean credit and mean threshold of the windows that have one."""
    table = binned(traffic, span.clipped(since_s))
    lines: list[Trace] = [
        {
            **_SHARE_LINE,
            "x": _middles(table["at"], span, zone),
            "y": _ratio(table[part], table[whole]),
            "name": name,
            "hovertemplate": f"%{{y:.2f}}{unit}",
        }
        for part, whole, name, unit in (
            ("credit", "credited", "credit, 0 to 1", ""),
            ("threshold", "lossy", "threshold of lossy methods, nats", " nats"),
        )
    ]
    return _figure(lines, span, zone, "credit; nats")


def in_flight(traffic: pd.DataFrame, span: Span, zone: tzinfo, since_s: float = 0.0) -> go.Figure:
    """Mean tokens drafted and not judged when feedback came, one line per method."""
    per_method = binned(traffic, span.clipped(since_s), by="method")
    lines: list[Trace] = [
        {
            **_SHARE_LINE,
            "x": _middles(rows["at"], span, zone),
            "y": _ratio(rows["in_flight"], rows["windows"]),
            "name": method_label(str(name)),
            "hovertemplate": "%{y:.1f} tokens",
        }
        for name, rows in per_method.groupby("method", sort=False)
    ]
    return _figure(lines, span, zone, "tokens in flight")


def _grouped_edges(traffic: pd.DataFrame) -> pd.DataFrame:
    """Keep the busiest edges by name and fold the rest into one, so that the legend stays short."""
    busiest = traffic.groupby("edge")["committed"].sum().nlargest(MAX_EDGES_SHOWN + 1)
    if len(busiest) <= MAX_EDGES_SHOWN:
        return traffic
    kept = set(busiest.index[: MAX_EDGES_SHOWN - 1])
    folded = traffic.assign(edge=traffic["edge"].where(traffic["edge"].isin(kept), OTHER_EDGES))
    return folded.groupby(["at_s", "edge", "method"], as_index=False)[list(COUNTS)].sum()


def _ratio(part: pd.Series[float], whole: pd.Series[int]) -> pd.Series[float]:
    """part ÷ whole, NaN (a gap in the line) where whole is 0."""
    return part / whole.where(whole > 0)


def _middles(at: pd.Series[pd.Timestamp], span: Span, zone: tzinfo) -> pd.Series[pd.Timestamp]:
    """Starts of bins, UTC → their middles by the viewer's wall clock.

    Naive, since plotly shows whatever clock it is given; the middle, since a point stands for its
    whole bin.
    """
    local = at.dt.tz_convert(zone).dt.tz_localize(None)
    return local + pd.Timedelta(seconds=span.bin_s / 2)


def _figure(
    traces: list[Trace],
    span: Span,
    zone: tzinfo,
    unit: str,
    share: bool = False,
    legend: bool = True,
) -> go.Figure:
    """The traces over the whole of `span`, with units on the axes and the legend below.

    Built from dicts in one go: plotly validates every later update at many times the cost.
    """
    start, end = (
        datetime.fromtimestamp(at_s, zone).replace(tzinfo=None)
        for at_s in (span.start_s, span.end_s)
    )
    layout = {
        "height": _HEIGHT_PX,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "hovermode": "x unified",
        "bargap": 0.15,
        "showlegend": legend,
        "legend": {"orientation": "h", "yanchor": "top", "y": -0.18, "x": 0},
        "uirevision": "live",  # a viewer's zoom and hidden lines survive the next refresh
        "xaxis": {
            "type": "date",
            "range": [start, end],
            "nticks": 7,
            "tickangle": 0,
            "tickformatstops": _CLOCK,
            "hoverformat": "%H:%M:%S",
        },
        "yaxis": {
            "title": {"text": unit},
            "rangemode": "tozero",
            "nticks": 6,
            **({"range": [0, 1.02], "tickformat": ".0%"} if share else {}),
        },
    }
    return go.Figure(data=traces, layout=layout)
