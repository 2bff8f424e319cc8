"""What the pages share: connections, one for all viewers of a process, and the viewer's clock."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import streamlit as st

from dashboard.answers import Answers
from dashboard.data import Feed
from dashboard.settings import DashboardSettings

NO_FADING = "<style>[data-stale='true'] { opacity: 1 !important; }</style>"
# Streamlit fades what a slow refresh has not drawn again yet; every few seconds that is flicker.


def shared_feed(settings: DashboardSettings) -> Feed:
    """The feed on these settings' Redis."""
    return _feed(settings, settings.redis_url, settings.key_prefix)


def shared_answers(settings: DashboardSettings) -> Answers:
    """The same for single answers."""
    return _answers(settings, settings.redis_url, settings.key_prefix)


@st.cache_resource(show_spinner=False, max_entries=4)
def _feed(_settings: DashboardSettings, url: str, prefix: str) -> Feed:  # noqa: ARG001
    """`url` and `prefix` are the cache's key."""
    return Feed.connect(_settings, min_interval_s=_settings.refresh_s / 2)


@st.cache_resource(show_spinner=False, max_entries=4)
def _answers(_settings: DashboardSettings, url: str, prefix: str) -> Answers:  # noqa: ARG001
    return Answers.connect(_settings)


def viewer_zone() -> tzinfo:
    """The browser's time zone; UTC where it names none that is known here."""
    try:
        return ZoneInfo(st.context.timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError):
        return UTC


def clock(at_s: float) -> str:
    return f"{datetime.fromtimestamp(at_s, viewer_zone()):%H:%M:%S}"
