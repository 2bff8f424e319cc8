"""The dashboard: pages behind one password. Run it with `streamlit run dashboard/app.py` or
`e2sci up`.

What is drawn comes from `data`, `answers`, `evidence`, `charts`, `tables` and `glossary`.
"""

from __future__ import annotations

import hmac

import streamlit as st
from streamlit.navigation.page import StreamlitPage

from bus.protocol.errors import ConfigurationError
from dashboard.settings import DashboardSettings
from dashboard.views import live, playground, session, tradeoffs
from dashboard.views import settings as settings_view
from dashboard.views.shared import NO_FADING


def main() -> None:
    st.set_page_config(page_title="E²-SCI", page_icon="⚡", layout="wide")
    try:
        settings = DashboardSettings.load()
    except ConfigurationError as error:
        st.error(f"The dashboard cannot start: {error}", icon=":material/error:")
        st.stop()
    if not unlocked(settings.dashboard_password.get_secret_value()):
        st.stop()
    st.html(NO_FADING)
    pages(settings).run()


def pages(settings: DashboardSettings) -> StreamlitPage:
    """The page that is open; the first one where none was asked for."""

    def draw_live() -> None:
        live.draw(settings)

    def draw_session() -> None:
        session.draw(settings)

    def draw_playground() -> None:
        playground.draw(settings)

    def draw_tradeoffs() -> None:
        tradeoffs.draw(settings)

    def draw_settings() -> None:
        settings_view.draw(settings)

    return st.navigation(
        [
            st.Page(draw_live, title="Live", icon=":material/speed:", default=True),
            st.Page(draw_session, title="Session", icon=":material/timeline:", url_path="session"),
            st.Page(
                draw_playground, title="Playground", icon=":material/edit_note:",
                url_path="playground",
            ),
            st.Page(
                draw_tradeoffs, title="Trade-offs", icon=":material/balance:",
                url_path="trade-offs",
            ),
            st.Page(draw_settings, title="Settings", icon=":material/tune:", url_path="settings"),
        ],
        position="top",
    )  # fmt: skip


def unlocked(password: str) -> bool:
    """Whether this browser session may see the page; draws the form that asks where not."""
    if not password or st.session_state.get("unlocked"):
        return True
    st.title("E²-SCI")
    with st.form("unlock", width=420):
        given = st.text_input("Password", type="password", autocomplete="current-password")
        sent = st.form_submit_button("Open the dashboard")
    if sent and hmac.compare_digest(given.encode(), password.encode()):
        st.session_state["unlocked"] = True
        st.rerun()
    if sent:
        st.error("That is not the password.", icon=":material/lock:")
    return False


if __name__ == "__main__":
    main()
