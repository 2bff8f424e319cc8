"""The page "Live": what changes are fragments, which Streamlit runs again by themselves and updates
in place; charts as often as they get a new point."""

from __future__ import annotations

import streamlit as st

from bus.protocol.errors import ConfigurationError, StoreUnavailableError
from dashboard import charts, tables, tiles
from dashboard.data import Feed, Snapshot
from dashboard.frames import BIN_S
from dashboard.glossary import TERMS, as_markdown
from dashboard.settings import DashboardSettings
from dashboard.views.shared import clock, shared_feed, viewer_zone

RANGES_S = dict(zip(("1 min", "5 min", "15 min", "1 h"), BIN_S, strict=True))
MOST_CHART_S = 15
SUBMIT_HINT = '`e2sci submit "Why is the sky blue?"`'


def draw(settings: DashboardSettings) -> None:
    """The page."""
    draw_header()
    feed, refresh_s = shared_feed(settings), settings.refresh_s
    chart_s = max(refresh_s, BIN_S[RANGES_S[st.session_state["time_range"]]])
    st.fragment(run_every=refresh_s)(draw_figures)(feed, refresh_s)
    st.fragment(run_every=min(chart_s, MOST_CHART_S))(draw_charts)(feed)
    st.fragment(run_every=refresh_s)(draw_tables)(feed, refresh_s)
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


def snapshot_of(feed: Feed) -> Snapshot | None:
    """Of the chosen range, as last read."""
    return feed.snapshot(RANGES_S[st.session_state["time_range"]])


def draw_figures(feed: Feed, refresh_s: float) -> None:
    """Read what is new; what is wrong, and the tiles."""
    problem = refresh(feed)
    snapshot = snapshot_of(feed)
    if problem is not None:
        draw_problem(problem, snapshot, refresh_s)
    if snapshot is None:
        return
    draw_notices(snapshot)
    with st.container(horizontal=True, gap="small"):
        for tile in tiles.of(snapshot):
            st.metric(tile.label, tile.value, help=tile.help, border=True, width=165)


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


def draw_charts(feed: Feed) -> None:
    snapshot = snapshot_of(feed)
    if snapshot is None or not snapshot.any_windows:
        return
    panels = (
        ("Goodput", "goodput", charts.goodput),
        ("Acceptance", "acceptance", charts.acceptance),
        ("Credit and threshold", "steering", charts.steering),
        ("Tokens in flight", "in flight", charts.in_flight),
        ("Rollbacks", "rollback", charts.rollbacks),
        ("Windows rolled back", "rollback share", charts.rollback_share),
    )
    if snapshot.traffic.empty:
        st.caption(f"No windows in the last {st.session_state['time_range']}.")
    zone = viewer_zone()
    for row in (panels[:2], panels[2:4], panels[4:]):
        for column, (title, term, draw) in zip(st.columns(2, gap="medium"), row, strict=True):
            column.markdown(f"##### {title}", help=TERMS[term])
            column.plotly_chart(
                draw(snapshot.traffic, snapshot.span, zone, snapshot.since_s),
                key=f"chart {title}",
                config={"displayModeBar": False},
                alt=f"{title}: {TERMS[term]}",
            )


def draw_tables(feed: Feed, refresh_s: float) -> None:
    snapshot = snapshot_of(feed)
    if snapshot is None:
        return
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
    st.caption(
        f"As of {clock(snapshot.now_s)}, refreshed every {refresh_s:g} s. Times are those of "
        "Redis, shown in your time zone."
    )
