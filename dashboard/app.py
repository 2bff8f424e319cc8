"""The page "Live": layout only. Run it with `streamlit run dashboard/app.py` or `e2sci up`.

Everything that changes is drawn by one fragment, which Streamlit runs again every few seconds
and updates in place. What is drawn comes from `data`, `charts`, `tables` and `glossary`.
"""

from __future__ import annotations

import hmac
from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import streamlit as st

from bus.errors import ConfigurationError, StoreUnavailableError
from dashboard import charts, tables, tiles
from dashboard.data import Feed, Snapshot
from dashboard.frames import BIN_S
from dashboard.glossary import TERMS, as_markdown
from dashboard.settings import DashboardSettings

RANGES_S = dict(zip(("1 min", "5 min", "15 min", "1 h"), BIN_S, strict=True))
NO_FADING = "<style>[data-stale='true'] { opacity: 1 !important; }</style>"
# Streamlit fades what a slow refresh has not drawn again yet; every few seconds that is flicker.

SUBMIT_HINT = '`e2sci submit "Why is the sky blue?"`'


@st.cache_resource(show_spinner=False, max_entries=4)
def shared_feed(_settings: DashboardSettings, url: str, prefix: str) -> Feed:  # noqa: ARG001
    """One feed for all viewers of this process; `url` and `prefix` are the cache's key."""
    return Feed.connect(_settings, min_interval_s=_settings.refresh_s / 2)


def main() -> None:
    st.set_page_config(page_title="E²-SCI live", page_icon=":material/speed:", layout="wide")
    try:
        settings = DashboardSettings.load()
    except ConfigurationError as error:
        st.error(f"The dashboard cannot start: {error}", icon=":material/error:")
        st.stop()
    if not unlocked(settings.dashboard_password.get_secret_value()):
        st.stop()
    draw_header()
    live = st.fragment(run_every=settings.refresh_s)(draw_live)
    live(shared_feed(settings, settings.redis_url, settings.key_prefix), settings.refresh_s)
    with st.expander("What the words mean", icon=":material/menu_book:"):
        st.markdown(as_markdown())


def unlocked(password: str) -> bool:
    """Whether this browser session may see the page; draws the form that asks where not."""
    if not password or st.session_state.get("unlocked"):
        return True
    st.title("E²-SCI live")
    with st.form("unlock", width=420):
        given = st.text_input("Password", type="password", autocomplete="current-password")
        sent = st.form_submit_button("Open the dashboard")
    if sent and hmac.compare_digest(given.encode(), password.encode()):
        st.session_state["unlocked"] = True
        st.rerun()
    if sent:
        st.error("That is not the password.", icon=":material/lock:")
    return False


def draw_header() -> None:
    st.html(NO_FADING)
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


def viewer_zone() -> tzinfo:
    """The browser's time zone; UTC where it names none that is known here."""
    try:
        return ZoneInfo(st.context.timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError):
        return UTC


def clock(at_s: float) -> str:
    return f"{datetime.fromtimestamp(at_s, viewer_zone()):%H:%M:%S}"


if __name__ == "__main__":
    main()
