"""The report of a run: one self-contained HTML page, and its main table as Markdown."""

from __future__ import annotations

import datetime
import json
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import msgspec
import plotly.graph_objects as go
import psutil
from markupsafe import escape
from plotly.offline import get_plotlyjs

from bench.claims import PLAN
from bench.evaluation.inertia import (
    HIGH,
    LOW,
    MEMORY,
    PAPER_HIGH,
    PAPER_LOW,
    Inertia,
    inertia,
)
from bench.evaluation.paddings import PlainTable
from bench.evaluation.rows import AnswerRow, WindowRow
from bench.evaluation.summary import (
    Duel,
    Line,
    as_markdown,
    columns,
    duel_table,
    duels,
    or_dash,
    where_of,
    whole_lines,
)
from bench.paced import short_name
from bench.ranges import Interval
from dashboard import evidence_charts
from dashboard.evidence import ALL, family, frame_of
from dashboard.timeline_chart import timeline_figure

REPORT, TABLE = "report.html", "table.md"
_TEMPLATE = Path(__file__).with_name("report.html.j2")
_LEAST_WINDOWS = 40
Value = Callable[[Line], Interval | None]
_BY_DATASET: dict[str, Value] = {
    "Speed over the target alone": lambda line: line.over_target,
    "Speed over sd with its best window": lambda line: line.over_sd,
    "Throughput, tokens a second": lambda line: line.speed,
}
"""Tables with a column for each data set."""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, what to see there in a sentence or two, and a figure or a table (HTML)."""

    title: str
    text: str
    body: str


def write_report(
    out: Path, rows: Sequence[AnswerRow], windows: Sequence[WindowRow], lines: Sequence[Line],
    found: Mapping[str, Inertia], others: Sequence[PlainTable] = (),
) -> Path:  # fmt: skip
    """Write `report.html` and `table.md`; the page's path.

    Args:
        others: tables that come after those of speed.
    """
    against = duels(rows)
    (out / TABLE).write_text(as_markdown(lines, against, others), "utf-8")
    sections = [
        *_tables(lines),
        *_duels(against),
        *(Section(one.title, one.text, _table(one.heads, one.body)) for one in others),
        *_charts(lines),
        *_inertia(found),
        *_timeline(windows),
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        sections=sections,
        about=_about(out, rows),
        sources=sorted({line.source for line in lines}),
        plotly=get_plotlyjs(),
    )
    path = out / REPORT
    path.write_text(page, "utf-8")
    return path


def by_dataset(windows: Sequence[WindowRow]) -> dict[str, Inertia]:
    """Credit inertia of each data set, over the answers of lossless methods in lockstep, whose
    windows have one size; all data sets together last. Without such answers nothing."""
    answers: dict[str, list[list[float]]] = defaultdict(list)
    for row in windows:
        sizes = {window.window for window in row.windows}
        if family(row.key.method) == "sd" and len(sizes) == 1:
            series = [w.num_accepted / w.num_drafted for w in row.windows if w.num_drafted]
            answers[row.key.dataset].append(series)
    found = {name: inertia(own) for name, own in answers.items()}
    if len(found) > 1:
        found[ALL] = inertia([series for own in answers.values() for series in own])
    return {name: own for name, own in found.items() if own.num_windows >= _LEAST_WINDOWS}


def inertia_lines(found: Mapping[str, Inertia]) -> list[str]:
    """For a terminal and a README."""
    return [
        f"{name}: {own.num_windows} windows, mean acceptance {own.mean:.2f}; autocorrelation at "
        f"lag 1 {own.autocorrelation[0]}, shuffled {own.shuffled:.2f}; windows after a mean above "
        f"{HIGH:g}: {_group(own.after_high, own.spread_high, own.num_high)}; below {LOW:g}: "
        f"{_group(own.after_low, own.spread_low, own.num_low)}"
        for name, own in found.items()
    ]


# --- sections ---------------------------------------------------------------------------------


def _tables(lines: Sequence[Line]) -> list[Section]:
    shown = columns(lines)
    sections = [
        Section(
            "All data sets together",
            "Tokens a second of decoding: after the first pass of the target. Intervals hold 95 % "
            "of resamples of prompts; ratios are of the same prompts.",
            _table(
                list(shown),
                [[show(line) for show in shown.values()] for line in whole_lines(lines)],
            ),
        )
    ]
    datasets = [name for name in dict.fromkeys(line.dataset for line in lines) if name != ALL]
    if len(datasets) > 1:
        names = {_key(line): f"{line.method}{where_of(line, lines)}" for line in lines}
        cells = {(*_key(line), line.dataset): line for line in lines}
        for title, value in _BY_DATASET.items():
            if not any(value(line) for line in lines):  # not measured
                continue
            body = [
                [shown, *(_cell(cells.get((*key, name)), value) for name in datasets)]
                for key, shown in names.items()
            ]
            sections.append(Section(title, "By data set.", _table(["method", *datasets], body)))
    return sections


def _duels(found: Sequence[Duel]) -> list[Section]:
    if not found:
        return []
    text = "Speed on the same prompts, one method ÷ the other; 95 % intervals over prompts."
    return [Section("One method against another", text, _table(*duel_table(found)))]


def _key(line: Line) -> tuple[str, float, str, str, str]:
    return line.method, line.rtt_ms, line.draft, line.variant, line.device


def _cell(line: Line | None, value: Value) -> str:
    return or_dash(None if line is None else value(line))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _charts(lines: Sequence[Line]) -> list[Section]:
    """Of each device the same charts."""
    devices = list(dict.fromkeys(line.device for line in lines))
    sections = []
    for device in devices:
        own = [line for line in lines if line.device == device]
        where = f", {short_name(device)}" if len(devices) > 1 else ""
        sections += [replace(one, title=one.title + where) for one in _device_charts(own)]
    return sections


def _device_charts(lines: Sequence[Line]) -> list[Section]:
    frame = frame_of([msgspec.to_builtins(line) for line in lines])
    usual = frame[frame["rtt_ms"] == frame["rtt_ms"].iloc[0]]
    sections = []
    if usual["over_target.value"].notna().any():
        text = "A bar above 1 is faster than the target alone over the same link."
        sections.append(_chart("Speed-up", text, evidence_charts.speedups(usual)))
    if usual["over_sd.value"].notna().any():
        text = "sd is speculative decoding in lockstep, with the static window that is best here."
        figure = evidence_charts.speedups(usual, "over_sd")
        sections.append(_chart("Against lockstep", text, figure))
    text = (
        "Each point is a method, a line joins the thresholds of one. Exact methods lose nothing; "
        "what a lossy one loses is measured by the target itself."
    )
    sections.append(_chart("Quality and speed", text, evidence_charts.quality_speed(usual)))
    text = "Modelled energy is watts of a busy and of an idle core times measured time."
    sections.append(_chart("Energy and latency", text, evidence_charts.energy_latency(usual)))
    if frame["variant"].nunique() > 1:
        text = "One setting of the workers, all else alike; labels, or the pointer, tell its value."
        sections.append(_chart("Settings", text, evidence_charts.by_setting(usual)))
    if frame["rtt_ms"].nunique() > 1:
        text = "Drafting ahead hides the link; lockstep pays it for every window."
        sections.append(_chart("Round trips", text, evidence_charts.round_trips(frame)))
    return sections


def _inertia(found: Mapping[str, Inertia]) -> list[Section]:
    if not found:
        return []
    curves = {
        name: [(e.value, e.low, e.high) for e in own.autocorrelation] for name, own in found.items()
    }
    heads = [
        "data set", "windows", "mean acceptance", "lag 1", "lag 1, shuffled",
        f"after a mean above {HIGH:g} (paper: {PAPER_HIGH:g})",
        f"after a mean below {LOW:g} (paper: {PAPER_LOW:g})",
    ]  # fmt: skip
    body = [
        [
            name, str(own.num_windows), f"{own.mean:.2f}", str(own.autocorrelation[0]),
            f"{own.shuffled:.2f}", _group(own.after_high, own.spread_high, own.num_high),
            _group(own.after_low, own.spread_low, own.num_low),
        ]
        for name, own in found.items()
    ]  # fmt: skip
    text = (
        f"Credit rests on windows being like the last {MEMORY}. Shuffled is what the "
        "autocorrelation would be if answers differed in difficulty and the order within them "
        "meant nothing."
    )
    chart = _chart("Credit inertia", text, evidence_charts.autocorrelation(curves))
    text = (
        "Mean, its 95 % interval, ± the standard deviation of single windows, how many there are."
    )
    return [chart, Section("Windows after good and bad stretches", text, _table(heads, body))]


def _group(estimate: Interval, spread: float, count: int) -> str:
    return f"{estimate} ± {spread:.2f} of {count}" if count > 1 else "none"


def _timeline(windows: Sequence[WindowRow]) -> list[Section]:
    kept = [row for row in windows if row.timeline is not None]
    if not kept:
        return []
    row = next((row for row in kept if family(row.key.method) == "e2sci"), kept[-1])
    assert row.timeline is not None
    text = f"{row.key.method} on one prompt of {row.key.dataset}, {row.key.rtt_ms:g} ms."
    return [_chart("A session's timeline", text, timeline_figure(row.timeline))]


def _chart(title: str, text: str, figure: go.Figure) -> Section:
    return Section(title, text, figure.to_html(full_html=False, include_plotlyjs=False))


def _about(out: Path, rows: Sequence[AnswerRow]) -> dict[str, str]:
    """What was run, where and when."""
    path = out / PLAN
    plan = json.loads(path.read_text("utf-8")) if path.exists() else {}
    memory = psutil.virtual_memory().total / 2**30
    return {
        "Date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "Machine": f"{psutil.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}",
        "Answers": f"{len(rows)}, of at most {plan.get('max_new_tokens', '?')} tokens",
        "Target and draft": f"{plan.get('target', '?')}, {plan.get('draft', '?')}",
        "Number format": ", ".join(sorted({row.dtype for row in rows})),
        "Device": "; ".join(dict.fromkeys(row.device for row in rows)),
        "Round trips": ", ".join(sorted({f"{row.rtt_ms:g} ms" for row in rows})),
        "Prompts at once": ", ".join(sorted({str(row.clients) for row in rows})),
    }
