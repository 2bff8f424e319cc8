"""Plotly figures from a bench's summary. Pure: the same frame gives the same figure.

All take lines as `dashboard.evidence` reads them. Simulated lines are hatched or hollow, so that
nobody takes them for measured ones. Colours are left to the theme, but one colour belongs to one
family of methods in every figure.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboard.evidence import ALL, whole

_COLOURS = (
    "#3b7dd8", "#e4863a", "#2f9e6e", "#c9495b", "#8a63c9", "#9a7350", "#d06fb4", "#14706f",
    "#b3a52c", "#2ea7b8",
)  # fmt: skip
_REFERENCE_GREY = "#8a8f98"
_TARGET = "target"
_REFERENCES = {_TARGET: _REFERENCE_GREY, "edge-target": "#c2c6cc", "colocated": "#4f5560"}
"""Baselines of one process: shades of grey."""
_HEIGHT_PX = 420
_LABELLED = 4
"""More labels than that lie on each other."""
_NAMES = {
    _TARGET: "target alone", "edge-target": "target on the edge", "colocated": "co-located SD",
}  # fmt: skip

Trace = dict[str, Any]


def colours(families: Sequence[str]) -> dict[str, str]:
    """Family of methods → colour; baselines of one process are grey."""
    others = [name for name in dict.fromkeys(families) if name not in _REFERENCES]
    known = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(others)}
    return {**_REFERENCES, **known}


def name_of(method: str) -> str:
    """A method's name for a legend: `colocated:4` → `co-located SD:4`."""
    base, colon, parameters = method.partition(":")
    return f"{_NAMES.get(base, base)}{colon}{parameters}"


def speedups(frame: pd.DataFrame, over: str = "over_target") -> go.Figure:
    """Speed over the target alone (or `over_sd`), by data set, with 95 % intervals."""
    palette = colours(list(frame["family"]))
    kept = frame[frame[f"{over}.value"].notna()]
    datasets = [name for name in dict.fromkeys(kept["dataset"]) if name != ALL] or [ALL]
    order = [*datasets, ALL] if ALL in set(kept["dataset"]) and datasets != [ALL] else datasets
    traces = []
    for method, lines in kept.groupby("method", sort=False):
        own = lines.drop_duplicates("dataset").set_index("dataset").reindex(order)
        traces.append(
            {
                "type": "bar",
                "name": name_of(str(method)),
                "x": ["all together" if name == ALL else name for name in order],
                "y": own[f"{over}.value"],
                "error_y": _errors(own, over),
                "marker": {
                    "color": palette[str(method).partition(":")[0]],
                    "pattern": {
                        "shape": "/" if set(own["source"].dropna()) == {"simulated"} else ""
                    },
                },
                "hovertemplate": f"{method}, %{{x}}: %{{y:.2f}} ×<extra></extra>",
            }
        )
    than = "the target alone" if over == "over_target" else "sd with its best window"
    figure = _figure(traces, f"Decoding speed over {than} (95 % intervals)")
    figure.update_yaxes(title=f"tokens/s ÷ {than}", rangemode="tozero")
    figure.add_hline(y=1.0, line={"dash": "dot", "color": _REFERENCE_GREY})
    return figure


def quality_speed(frame: pd.DataFrame) -> go.Figure:
    """Speed against what it costs: log-likelihood below the target's, and agreement with it."""
    lines = whole(frame)
    palette = colours(list(frame["family"]))
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.05,
        subplot_titles=("log-likelihood lost, nats a token", "tokens that are the target's own"),
    )  # fmt: skip
    for name, points in lines.groupby("family", sort=False):
        own = points.assign(loss=_loss(points)).sort_values("loss")
        for column, values in enumerate((own["loss"], own["agreement"]), start=1):
            figure.add_trace(
                {
                    "type": "scatter",
                    "x": values,
                    "y": own["speed.value"],
                    "name": name_of(str(name)),
                    "legendgroup": str(name),
                    "showlegend": column == 1,
                    "mode": "lines+markers" if len(own) > 1 else "markers",
                    "marker": {"size": 9, "color": palette[str(name)], "symbol": _symbols(own)},
                    "line": {"color": palette[str(name)], "width": 1.5},
                    "error_y": _errors(own, "speed") | {"thickness": 0.8, "width": 2},
                    "customdata": own["ran"],
                    "hovertemplate": "%{customdata}: %{y:.1f} tokens/s, %{x:.3f}<extra></extra>",
                },
                row=1,
                col=column,
            )
    least = float(lines["agreement"].min())
    room = max(0.1 * (1.0 - least), 0.005)
    figure.update_xaxes(
        tickformat=".0%" if least < 0.95 else ".1%", row=1, col=2, range=[1.0 + room, least - room]
    )
    figure.update_xaxes(rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="tokens/s", row=1, col=1)
    return _styled(figure, "Quality against speed: up is faster, left is nearer to the target")


def energy_latency(frame: pd.DataFrame) -> go.Figure:
    """Millijoules a token against milliseconds a token; down and left is better."""
    lines = whole(frame)
    palette = colours(list(frame["family"]))
    traces = [
        {
            "type": "scatter",
            "x": 1e3 / own["end_to_end.value"],
            "y": own["mj_per_token"],
            "name": name_of(str(name)),
            "mode": "lines+markers" if len(own) > 1 else "markers",
            "marker": {"size": 10, "color": palette[str(name)], "symbol": _symbols(own)},
            "line": {"width": 1},
            "customdata": own["ran"],
            "hovertemplate": "%{customdata}: %{x:.0f} ms, %{y:.0f} mJ a token<extra></extra>",
        }
        for name, own in lines.groupby("family", sort=False)
    ]
    source = ", ".join(sorted(set(lines["energy_source"])))
    figure = _figure(traces, f"Energy ({source}) against latency, whole answers")
    figure.update_xaxes(title="milliseconds a token, end to end")
    figure.update_yaxes(title="millijoules a token, edge and cloud")
    return figure


def by_setting(frame: pd.DataFrame) -> go.Figure:
    """Energy against latency where a setting of the workers was varied; a line for each method."""
    lines = whole(frame)
    traces = [
        {
            "type": "scatter",
            "x": 1e3 / own["end_to_end.value"],
            "y": own["mj_per_token"],
            "name": name_of(str(method)),
            "mode": "lines+markers+text" if lines["variant"].nunique() <= _LABELLED else "markers",
            "text": [_value_of(str(variant)) for variant in own["variant"]],
            "textposition": "top center",
            "marker": {"size": 9, "color": colour, "symbol": _symbols(own)},
            "line": {"width": 1, "color": colour},
            "hovertemplate": "%{text}: %{x:.0f} ms, %{y:.0f} mJ a token<extra></extra>",
        }
        for (method, own), colour in zip(
            lines.groupby("method", sort=False), itertools.cycle(_COLOURS)
        )
    ]
    source = ", ".join(sorted(set(lines["energy_source"])))
    figure = _figure(traces, f"Energy ({source}) against latency, by setting")
    figure.update_xaxes(title="milliseconds a token, end to end")
    figure.update_yaxes(title="millijoules a token, edge and cloud")
    return figure


def _value_of(variant: str) -> str:
    """`credit_memory=3` → `credit_memory 3`; of a path the file's name, without its ending."""
    name, _, value = variant.partition("=")
    if "/" in value:
        return PurePath(value).stem
    return f"{name} {value}" if value else "as usual"


def round_trips(frame: pd.DataFrame) -> go.Figure:
    """Speed of each method over the round trip of the link."""
    lines = whole(frame)
    palette = colours(list(frame["family"]))
    traces = [
        {
            "type": "scatter",
            "x": own["rtt_ms"],
            "y": own["speed.value"],
            "error_y": _errors(own, "speed"),
            "name": name_of(str(method)),
            "mode": "lines+markers",
            "line": {"color": palette[str(method).partition(":")[0]]},
        }
        for method, own in lines.sort_values("rtt_ms").groupby("method", sort=False)
    ]
    figure = _figure(traces, "Decoding speed over the link's round trip")
    figure.update_xaxes(title="round trip, ms")
    figure.update_yaxes(title="tokens/s", rangemode="tozero")
    return figure


def autocorrelation(curves: Mapping[str, Sequence[tuple[float, float, float]]]) -> go.Figure:
    """Autocorrelation of window acceptance at lags 1, 2, …: data set → (value, low, high)."""
    traces = []
    for index, (name, curve) in enumerate(curves.items()):
        values = pd.DataFrame(curve, columns=["value", "low", "high"])
        traces.append(
            {
                "type": "scatter",
                "x": list(range(1, len(curve) + 1)),
                "y": values["value"],
                "error_y": {
                    "type": "data", "symmetric": False, "width": 2, "thickness": 0.8,
                    "array": values["high"] - values["value"],
                    "arrayminus": values["value"] - values["low"],
                },
                "name": name,
                "mode": "lines+markers",
                "line": {"color": _COLOURS[index % len(_COLOURS)]},
            }
        )  # fmt: skip
    figure = _figure(traces, "Are windows like those before them? (95 % intervals)")
    figure.update_xaxes(title="lag, windows", dtick=1)
    figure.update_yaxes(title="autocorrelation of acceptance")
    figure.add_hline(y=0.0, line={"dash": "dot", "color": _REFERENCE_GREY})
    return figure


def _loss(own: pd.DataFrame) -> pd.Series[float]:
    """Nats below the target alone on the same prompts; below its first choice without it."""
    below = own["nats_below_target"].astype(float)
    return below if below.notna().all() else own["regret"]


def _symbols(own: pd.DataFrame) -> list[str]:
    return ["circle-open" if source == "simulated" else "circle" for source in own["source"]]


def _errors(own: pd.DataFrame, name: str) -> Trace:
    value = own[f"{name}.value"]
    return {
        "type": "data", "symmetric": False, "width": 3, "thickness": 1,
        "array": own[f"{name}.high"] - value, "arrayminus": value - own[f"{name}.low"],
    }  # fmt: skip


def _figure(traces: Sequence[Trace], title: str) -> go.Figure:
    return _styled(go.Figure(data=list(traces)), title)


def _styled(figure: go.Figure, title: str) -> go.Figure:
    figure.update_layout(
        title={"text": title, "x": 0.0, "font": {"size": 16}},
        height=_HEIGHT_PX,
        margin={"l": 10, "r": 10, "t": 70, "b": 10},
        legend={"orientation": "h", "y": -0.2},
        hovermode="closest",
    )
    return figure
