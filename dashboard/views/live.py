"""The page "Live": everything that changes is one fragment, which Streamlit runs again every few
seconds and updates in place."""

from __future__ import annotations

import streamlit as st

from bus.errors import ConfigurationError, StoreUnavailableError
from dashboard import charts, tables, tiles
from dashboard.data import Feed, Snapshot
from dashboard.frames import BIN_S
from dashboard.glossary import TERMS, as_markdown
from dashboard.settings import DashboardSettings
from dashboard.views.shared import clock, shared_feed, viewer_zone

RANGES_S = dict(zip(("1 min", "5 min", "15 min", "1 h"), BIN_S, strict=True))
SUBMIT_HINT = '`e2sci submit "Why is the sky blue?"`'


def draw(settings: DashboardSettings) -> None:
    """The page."""
    draw_header()
    live = st.fragment(run_every=settings.refresh_s)(draw_live)
    live(shared_feed(settings), settings.refresh_s)
    with st.expander("What the words mean", icon=":material/menu_book:"):
        st.markdown(as_markdown())


def draw_header() -> None:
    st.title("E²-SCI live")
    st.caption(
        "Speculative decoding between edge and cloud: a small draft model near the user guesses "
        "tokens ahead, the large target model in the cloud checks them."
    )
    st.segmented_control(
        "Time range", list(RANGES_S), default="5 min", required=True, key="time_range"
    )


def draw_live(feed: Feed, refresh_s: float) -> None:
    """Everything that changes, as one fragment."""
    problem = refresh(feed)
    snapshot = feed.snapshot(RANGES_S[st.session_state["time_range"]])
    if problem is not None:
        draw_problem(problem, snapshot, refresh_s)
    if snapshot is None:
        return
    draw_notices(snapshot)
    with st.container(horizontal=True, gap="small"):
        for tile in tiles.of(snapshot):
            st.metric(tile.label, tile.value, help=tile.help, border=True, width=165)
    if snapshot.any_windows:
        draw_charts(snapshot)
    draw_tables(snapshot)
    st.caption(
        f"As of {clock(snapshot.now_s)}, refreshed every {refresh_s:g} s. Times are those of "
        "Redis, shown in your time zone."
    )


def refresh(feed: Feed) -> str | None:
    """Read what is new; returns what went wrong."""
    try:
        feed.refresh()
    except (StoreUnavailableError, ConfigurationError) as error:
        return str(error)
    return None


def draw_problem(problem: str, snapshot: Snapshot | None, refresh_s: float) -> None:
    shown = (
        "Nothing has been read yet."
        if snapshot is None
        else f"The page shows what was read at {clock(snapshot.now_s)}."
    )
    st.error(
        f"**No connection to Redis.** {problem}.\n\n{shown} Trying again every {refresh_s:g} s; "
        "the page recovers by itself.",
        icon=":material/cloud_off:",
    )


def draw_notices(snapshot: Snapshot) -> None:
    for notice in tiles.notices(snapshot):
        st.warning(notice, icon=":material/warning:")
    if not snapshot.any_windows:
        st.info(f"No windows yet: start with {SUBMIT_HINT}.", icon=":material/play_arrow:")


def draw_charts(snapshot: Snapshot) -> None:
    panels = (
        ("Goodput", "goodput", charts.goodput),
        ("Acceptance", "acceptance", charts.acceptance),
        ("Rollbacks", "rollback", charts.rollbacks),
        ("Windows rolled back", "rollback share", charts.rollback_share),
    )
    if snapshot.traffic.empty:
        st.caption(f"No windows in the last {st.session_state['time_range']}.")
    zone = viewer_zone()
    for row in (panels[:2], panels[2:]):
        for column, (title, term, draw) in zip(st.columns(2, gap="medium"), row, strict=True):
            column.markdown(f"##### {title}", help=TERMS[term])
            column.plotly_chart(
                draw(snapshot.traffic, snapshot.span, zone, snapshot.since_s),
                key=f"chart {title}",
                config={"displayModeBar": False},
                alt=f"{title}: {TERMS[term]}",
            )


def draw_tables(snapshot: Snapshot) -> None:
    for table in tables.of(snapshot):
        st.markdown(f"##### {table.title}", help=table.help)
        if table.rows.empty:
            st.caption(table.when_empty)
        else:
            st.dataframe(
                table.rows,
                hide_index=True,
                placeholder="–",
                column_config=table.columns,
                key=f"table {table.title}",
                alt=table.help,
            )
