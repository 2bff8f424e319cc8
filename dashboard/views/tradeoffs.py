"""The page "Trade-offs": what a run of `e2sci bench` found, method by method."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from dashboard import evidence_charts
from dashboard.evidence import SUMMARY, read_summary, runs_under, whole
from dashboard.glossary import TERMS
from dashboard.settings import DashboardSettings

_NO_BAR = {"displayModeBar": False}
_COLUMNS = {
    "ran": ("Method", ""),
    "speed.value": ("Tokens/s", "Of decoding, after the first pass."),
    "over_target.value": ("÷ target alone", "Speed over the target without a draft."),
    "over_sd.value": ("÷ sd", "Speed over lockstep with its best window."),
    "acceptance": ("Accepted", TERMS["acceptance"]),
    "nats_per_token": ("Nats a token", "Mean log-likelihood of the text under the target."),
    "agreement": ("Target's own", "Share of tokens that are the target's first choice."),
    "accuracy": ("Right", "Share of right answers."),
    "mj_per_token": ("mJ a token", "Energy of edge and cloud over the whole answer."),
}


def draw(settings: DashboardSettings) -> None:
    """The page."""
    st.title("Trade-offs")
    st.caption("Speed against quality and energy, as `e2sci bench` measured them in one run.")
    folder = settings.evidence
    runs = runs_under(folder)
    if not runs:
        st.info(
            f"No run of `e2sci bench` under `{folder}` yet. `e2sci bench --quick --out "
            f"{folder}/quick` makes one in three minutes; the setting `evidence` "
            "(E2SCI_EVIDENCE) says where to look.",
            icon=":material/folder_open:",
        )
        return
    chosen = st.selectbox(
        "Run", runs, format_func=lambda path: _name(path, folder),
        help=f"Folders with a {SUMMARY}, the newest first.",
    )  # fmt: skip
    try:
        frame = read_summary(chosen / SUMMARY)
    except (OSError, ValueError) as error:
        st.error(f"`{chosen / SUMMARY}` cannot be read: {error}", icon=":material/error:")
        return
    if "variant" in frame and frame["variant"].nunique() > 1:
        _chart(st, "settings", evidence_charts.by_setting(frame))
    draw_frame(_narrowed(frame))


def draw_frame(frame: pd.DataFrame) -> None:
    """Charts and table of one installation's lines, all its links."""
    rtts = sorted(frame["rtt_ms"].unique())
    rtt = rtts[0]
    if len(rtts) > 1:
        rtt = st.segmented_control(
            "Round trip", rtts, default=rtts[0], required=True, format_func=lambda ms: f"{ms:g} ms"
        )
    here = frame[frame["rtt_ms"] == rtt]
    if "simulated" in set(here["source"]):
        st.warning("Hollow and hatched marks are simulated, not measured.", icon=":material/info:")
    left, right = st.columns(2, gap="medium")
    _chart(left, "quality", evidence_charts.quality_speed(here))
    _chart(right, "energy", evidence_charts.energy_latency(here))
    if here["over_target.value"].notna().any():
        _chart(left, "alone", evidence_charts.speedups(here))
    if here["over_sd.value"].notna().any():
        _chart(right, "sd", evidence_charts.speedups(here, over="over_sd"))
    if len(rtts) > 1:
        _chart(st, "links", evidence_charts.round_trips(frame))
    _table(whole(here))


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path != folder else str(path)


def _narrowed(frame: pd.DataFrame) -> pd.DataFrame:
    """The lines of one draft, one setting of the workers and one device; asks which where there
    are several."""
    for column, label in (("draft", "Draft"), ("variant", "Setting"), ("device", "Device")):
        if column in frame and frame[column].nunique() > 1:
            found = st.selectbox(
                label, list(frame[column].unique()), format_func=lambda text: text or "as usual"
            )
            frame = frame[frame[column] == found]
    return frame


def _chart(place: object, key: str, figure: object) -> None:
    place.plotly_chart(figure, key=f"evidence {key}", config=_NO_BAR)  # type: ignore[attr-defined]


def _table(lines: pd.DataFrame) -> None:
    shown = [name for name in _COLUMNS if name in lines and lines[name].notna().any()]
    percent = {"acceptance", "agreement", "accuracy"}
    st.dataframe(
        lines[shown],
        hide_index=True,
        placeholder="–",
        column_config={
            name: _COLUMNS[name][0]
            if name == "ran"
            else st.column_config.NumberColumn(
                _COLUMNS[name][0],
                help=_COLUMNS[name][1],
                format="percent" if name in percent else "%.3g",
            )
            for name in shown
        },
        key="evidence table",
    )
