"""One session's timeline as a plotly figure: what edge, link and cloud did at each moment.

Pure: knows the events (`bus.store.TimelineEntry`), not where they come from. Colours are legible
on light and on dark, and the background is left to the page.

The edge's clock is the only one there is. A window and its feedback are taken to need the same time
on their ways, so feedback left the cloud half a round trip before it came, and its pass ended
then. Of a window that nobody judged only the sending is known; it is drawn with the session's
median.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from bus.store import DraftSpan, PassSpan, Rollback, StageSpan, TimelineEntry, WindowSpan
from dashboard.charts import Trace, method_label

MIDDLE_Y, EDGE_Y, LINK_Y, CLOUD_Y = 3.0, 2.0, 1.0, 0.0
"""Heights of the lanes; the first is there where a middle worker was."""
_HALF_LANE = 0.3
_STANDS, _VAIN, _PASS, _ROLLBACK = "#3b82f6", "#f59e0b", "#10a37f", "#ef4444"
_OWN = "#8b5cf6"
_TEXT, _GRID, _RIM = "#7b818c", "rgba(123, 129, 140, 0.25)", "rgba(0, 0, 0, 0.3)"

Span = tuple[float, float, str]
"""From, to in ms, and what to say about it."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """What is drawn; times in ms.

    Attributes:
        stands, vain: drafting, by whether the tokens were accepted.
        up, up_vain: windows on their way to the cloud; the latter are discarded.
        down: feedback on their way back.
        passes: of the target, over drafts; own: those without; trees: those over what its
            speculator proposed.
        middle, middle_own: the same of a middle worker's model.
        prehits: (ms, text) of windows that the kept row rejected, without a pass.
        rollbacks: (ms, text).
    """

    stands: tuple[Span, ...]
    vain: tuple[Span, ...]
    up: tuple[Span, ...]
    up_vain: tuple[Span, ...]
    down: tuple[Span, ...]
    passes: tuple[Span, ...]
    own: tuple[Span, ...]
    trees: tuple[Span, ...]
    middle: tuple[Span, ...]
    middle_own: tuple[Span, ...]
    prehits: tuple[tuple[float, str], ...]
    rollbacks: tuple[tuple[float, str], ...]


def lanes_of(entry: TimelineEntry) -> Lanes:
    """Sort a session's events into lanes."""
    windows = [event for event in entry.events if isinstance(event, WindowSpan)]
    judged = [window for window in windows if window.outcome != "dropped"]
    dropped = [window for window in windows if window.outcome == "dropped"]
    usual_ms = statistics.median([_one_way_ms(w) for w in judged]) if judged else 0.0
    stands, vain = _drafting([e for e in entry.events if isinstance(e, DraftSpan)], windows)
    ends = [(window, window.end_ms - _one_way_ms(window)) for window in judged]
    alone = [event for event in entry.events if isinstance(event, PassSpan)]
    stages = [event for event in entry.events if isinstance(event, StageSpan)]
    return Lanes(
        stands=stands,
        vain=vain,
        up=tuple((w.at_ms, w.at_ms + _one_way_ms(w), _window_text(w)) for w in judged),
        up_vain=tuple(
            (w.at_ms, w.at_ms + usual_ms, f"{_window_text(w)}, made void by a rollback")
            for w in dropped
        ),
        down=tuple((left_ms, w.end_ms, _feedback_text(w)) for w, left_ms in ends),
        passes=tuple(
            (left_ms - w.verify_ms, left_ms, f"pass over {w.pass_tokens} tokens")
            for w, left_ms in ends
            if w.pass_tokens
        ),
        own=tuple(
            (event.at_ms, event.end_ms, "the target writes a token by itself")
            for event in alone
            if not event.proposed
        ),
        trees=tuple((e.at_ms, e.end_ms, _tree_text(e)) for e in alone if e.proposed),
        middle=tuple(map(_stage_span, filter(_has_drafts, stages))),
        middle_own=tuple(_stage_span(span) for span in stages if not _has_drafts(span)),
        prehits=tuple(
            (left_ms, f"{_window_text(w)}: first token rejected")
            for w, left_ms in ends
            if w.outcome == "prehit_rejected"
        ),
        rollbacks=tuple(
            (event.at_ms, f"rolled back to {event.length} tokens, prompt included")
            for event in entry.events
            if isinstance(event, Rollback)
        ),
    )


def _tree_text(span: PassSpan) -> str:
    return (
        f"pass over a tree of {span.proposed} proposed tokens, depth {span.depth}: "
        f"{span.num_accepted} accepted"
    )


def _has_drafts(span: StageSpan) -> bool:
    return span.pass_tokens > 1


def _stage_span(span: StageSpan) -> Span:
    text = f"{span.worker}: pass over {span.pass_tokens} tokens, {span.num_accepted} accepted"
    return span.at_ms, span.end_ms, text


def _one_way_ms(window: WindowSpan) -> float:
    """Half of the round trip, as far as the window was in flight so long."""
    return min(window.rtt_ms, window.end_ms - window.at_ms) / 2


def _window_text(window: WindowSpan) -> str:
    return f"window {window.number}, {window.num_tokens} tokens"


def _feedback_text(window: WindowSpan) -> str:
    return (
        f"{_num_standing(window)} of {window.num_tokens} tokens of window {window.number} accepted"
    )


def _num_standing(window: WindowSpan) -> int:
    """A window whose feedback came with a later one was accepted in full."""
    return window.num_tokens if window.outcome == "accepted" else window.num_accepted


def _drafting(
    drafts: list[DraftSpan], windows: list[WindowSpan]
) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """Each draft cut at its first token that was not accepted; one that was never sent is vain.

    What is drafted again from the same position replaces what was thrown away there.
    """
    newest = {(draft.start, draft.num_tokens): draft for draft in drafts}
    standing = {
        id(newest[key]): _num_standing(window)
        for window in windows
        if (key := (window.start, window.num_tokens)) in newest
    }
    stands: list[Span] = []
    vain: list[Span] = []
    for draft in drafts:
        kept, count = standing.get(id(draft), 0), draft.num_tokens
        cut_ms = draft.at_ms + (draft.end_ms - draft.at_ms) * kept / max(count, 1)
        if kept:
            stands.append((draft.at_ms, cut_ms, f"{kept} of {count} tokens, from {draft.start}"))
        if kept < count:
            text = f"{count - kept} of {count} tokens, from {draft.start + kept}"
            vain.append((cut_ms, draft.end_ms, text))
    return tuple(stands), tuple(vain)


def timeline_figure(entry: TimelineEntry, source: str = "measured") -> go.Figure:
    """The session as three lanes over time; four where there was a middle worker.

    Args:
        source: `measured` or `simulated`, for the title.
    """
    lanes = lanes_of(entry)
    traces = [
        _bars("drafting: the token is accepted", lanes.stands, EDGE_Y, _STANDS),
        _bars("drafting: the token is discarded", lanes.vain, EDGE_Y, _VAIN),
        _ways("window on its way to the cloud", lanes.up, down=True, colour=_STANDS),
        _ways("window that is discarded", lanes.up_vain, down=True, colour=_VAIN),
        _ways("feedback on its way back", lanes.down, down=False, colour=_PASS),
        _bars("the target verifies: one pass", lanes.passes, CLOUD_Y, _PASS),
        _bars("the target writes by itself", lanes.own, CLOUD_Y, _OWN),
        _bars("the target verifies a tree of its speculator", lanes.trees, CLOUD_Y, _PASS),
        _bars("the middle model verifies: one pass", lanes.middle, MIDDLE_Y, _PASS),
        _bars("the middle model writes by itself", lanes.middle_own, MIDDLE_Y, _OWN),
        _marks("first token rejected, no pass", lanes.prehits, CLOUD_Y, "x-thin"),
        _marks("rollback", lanes.rollbacks, EDGE_Y + _HALF_LANE + 0.1, "triangle-down"),
    ]
    shown = [trace for trace in traces if len(trace["x"])]
    return go.Figure(
        data=shown, layout=_layout(_title(entry, source), bool(lanes.middle or lanes.middle_own))
    )


def _title(entry: TimelineEntry, source: str) -> str:
    ends = [event.end_ms for event in entry.events if isinstance(event, WindowSpan | PassSpan)]
    seconds = max(ends, default=0.0) / 1e3
    return f"One answer with {method_label(entry.method)}, {seconds:.1f} s ({source})"


def _bars(name: str, spans: Iterable[Span], y: float, colour: str) -> Trace:
    """Spans as bars in the lane at height `y`."""
    kept = list(spans)
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "base": [begin for begin, _, _ in kept],
        "x": [end - begin for begin, end, _ in kept],
        "y": [y] * len(kept),
        "width": 2 * _HALF_LANE,
        "marker": {"color": colour, "line": {"width": 0.5, "color": _RIM}},
        "text": [text for _, _, text in kept],
        "textposition": "none",
        "hovertemplate": "%{text}<br>%{base:.1f} ms, for %{x:.1f} ms<extra></extra>",
    }


def _ways(name: str, spans: Iterable[Span], down: bool, colour: str) -> Trace:
    """Messages as lines between edge and cloud; a gap after each."""
    top, bottom = EDGE_Y - _HALF_LANE, CLOUD_Y + _HALF_LANE
    ends = (top, bottom) if down else (bottom, top)
    xs: list[float | None] = []
    ys: list[float | None] = []
    texts: list[str] = []
    for begin, end, text in spans:
        xs += [begin, end, None]
        ys += [*ends, None]
        texts += [text, text, ""]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": xs,
        "y": ys,
        "line": {"color": colour, "width": 1.5, "dash": "solid" if down else "dot"},
        "text": texts,
        "hovertemplate": "%{text}<br>%{x:.1f} ms<extra></extra>",
    }


def _marks(name: str, points: Iterable[tuple[float, str]], y: float, symbol: str) -> Trace:
    kept = list(points)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [at_ms for at_ms, _ in kept],
        "y": [y] * len(kept),
        "marker": {
            "symbol": symbol,
            "size": 9,
            "color": _ROLLBACK,
            "line": {"width": 2, "color": _ROLLBACK},
        },
        "text": [text for _, text in kept],
        "hovertemplate": "%{text}<br>%{x:.1f} ms<extra></extra>",
    }


def _layout(title: str, has_middle: bool) -> dict[str, Any]:
    names = {EDGE_Y: "edge: draft", LINK_Y: "link", CLOUD_Y: "cloud: target"}
    if has_middle:
        names = {MIDDLE_Y: "middle: its model", **names, EDGE_Y: "edge: middle's text"}
    return {
        "title": {"text": title, "x": 0, "xref": "paper", "font": {"size": 16}},
        "font": {"color": _TEXT},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "height": 400,
        "margin": {"l": 8, "r": 12, "t": 48, "b": 8},
        "barmode": "overlay",
        "hovermode": "closest",
        "legend": {"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0},
        "xaxis": {
            "title": {"text": "ms since the answer began"},
            "rangemode": "tozero",
            "gridcolor": _GRID,
            "zeroline": False,
        },
        "yaxis": {
            "tickvals": list(names),
            "ticktext": list(names.values()),
            "range": [CLOUD_Y - 0.5, max(names) + 0.6],
            "ticks": "outside",
            "ticklen": 8,
            "tickcolor": "rgba(0, 0, 0, 0)",
            "showgrid": False,
            "zeroline": False,
            "automargin": True,
        },
    }
