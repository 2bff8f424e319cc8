"""The page "Session": one request, window by window."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from bus.protocol.errors import E2SCIError
from bus.store import Usage, WindowEntry
from dashboard.answers import Trail
from dashboard.charts import method_label
from dashboard.coloured import LEGEND, REFUSED_LEGEND, as_html, why
from dashboard.glossary import TERMS
from dashboard.settings import DashboardSettings
from dashboard.telemetry import credit_of
from dashboard.timeline_chart import timeline_figure
from dashboard.views.shared import shared_answers, shared_feed
from decoding import methods

_RANGE_S = 3600
_PARAMETER = "request"


def draw(settings: DashboardSettings) -> None:
    """The page."""
    st.title("Session")
    st.caption(f"{TERMS['session']} Here with every window, and why tokens were thrown away.")
    request = _choose(settings)
    if request:
        st.query_params[_PARAMETER] = request
        fragment = st.fragment(run_every=settings.refresh_s)(draw_request)
        fragment(settings, request)


def _choose(settings: DashboardSettings) -> str:
    feed = shared_feed(settings)
    try:
        feed.refresh()
    except E2SCIError as error:
        st.error(f"**No connection to Redis.** {error}", icon=":material/cloud_off:")
        return ""
    snapshot = feed.snapshot(_RANGE_S)
    known = []
    if snapshot is not None:
        known = [*snapshot.sessions["request"], *snapshot.finished["request"]]
    asked = st.query_params.get(_PARAMETER)
    if asked and asked not in known:
        known = [asked, *known]
    if not known:
        st.info(
            "No requests in the last hour: write one on the page Playground, or with "
            '`e2sci submit "Why is the sky blue?"`.',
            icon=":material/play_arrow:",
        )
        return ""
    return st.selectbox(
        "Request", known, index=known.index(asked) if asked else 0, accept_new_options=True,
        help="Running ones first, then the latest; or type an id.",
    )  # fmt: skip


def draw_request(settings: DashboardSettings, request: str) -> None:
    """Everything about one request."""
    answers = shared_answers(settings)
    try:
        answer = answers.answer(request)
        trail = answers.trail(answer)
        story = answers.story(request)
    except E2SCIError as error:
        st.error(f"{error}", icon=":material/cloud_off:")
        return
    if not answer.pieces and answer.end is None:
        st.info(
            f"Nothing has been written for `{request}` yet"
            + ("." if answer.queue_state else ", and nobody knows this request.")
        )
        _draw_story(story)
        return
    st.markdown("##### Answer")
    st.html(f"{LEGEND}{REFUSED_LEGEND}" + as_html(answer.pieces, trail.windows))
    if answer.end is not None:
        reason = answer.end.error or str(answer.end.finish_reason)
        st.caption(f"Ended: {reason}. {TERMS['finish reason']}")
        _draw_middle(answer.end.usage)
        _draw_trees(answer.end.usage)
    _draw_timeline(trail)
    _draw_windows(trail.windows)
    _draw_story(story)


def _draw_middle(usage: Usage) -> None:
    """What a middle worker did, where there was one."""
    if usage.middle_passes:
        st.caption(
            f"Middle worker: {usage.middle_tokens} tokens in {usage.middle_passes} passes of "
            f"{usage.middle_seconds:.1f} s together, {usage.middle_own_passes} of them without a "
            f"draft; {usage.middle_accepted_tokens} of {usage.middle_drafted_tokens} drafts for it "
            f"accepted; began again {usage.middle_restarts} times. {TERMS['middle']}"
        )


def _draw_trees(usage: Usage) -> None:
    """What the target's speculator proposed, where it did."""
    if usage.proposed and usage.windows:
        st.caption(
            f"Trees: {usage.windows} proposed by the target's speculator, "
            f"{usage.proposed / usage.windows:.1f} tokens and depth "
            f"{usage.drafted_tokens / usage.windows:.1f} each; "
            f"{usage.accepted_tokens / usage.windows:.2f} accepted in a pass. {TERMS['tree']}"
        )


def _draw_story(story: dict[str, list[str]]) -> None:
    """The session's last events as its workers saw them."""
    with st.expander("Story", icon=":material/history:"):
        if not story:
            st.caption("No worker has reported this session within the last hour.")
        for worker, lines in story.items():
            st.caption(f"The last events at `{worker}`, and what it did:")
            st.code("\n".join(lines), language=None)


def _draw_timeline(trail: Trail) -> None:
    st.markdown("##### Who did what, when")
    if trail.timeline is None:
        st.caption(
            "No timeline: it is written at the end of a session whose edge runs with "
            "`E2SCI_TIMELINE=1`, such as `E2SCI_TIMELINE=1 e2sci up`."
        )
        return
    st.plotly_chart(timeline_figure(trail.timeline), config={"displayModeBar": False})


def _draw_windows(windows: tuple[WindowEntry, ...]) -> None:
    method = methods.find(windows[0].method) if windows else None
    steps = None if method is None else method.steps
    kind = "window" if steps is None else "step"
    st.markdown(f"##### {kind.capitalize()}s", help=TERMS[kind])
    if not windows:
        st.caption("Telemetry holds none of them any more.")
        return
    lossless = method is not None and method.acceptance.lossless
    has_threshold = method is None or method.acceptance.compares
    judge = "" if steps is None else steps.judge.name
    first_ms = windows[0].at_ms
    column = st.column_config
    st.caption(f"Decoded with {method_label(windows[0].method)}.")
    st.dataframe(
        pd.DataFrame(
            {
                "at_s": [(w.at_ms - first_ms) / 1e3 for w in windows],
                "proposed": [w.proposed or None for w in windows],
                "drafted": [w.num_drafted for w in windows],
                "accepted": [w.num_accepted for w in windows],
                "why": [why(w, lossless, judge) for w in windows],
                "threshold": [w.threshold if has_threshold else None for w in windows],
                "credit": [credit_of(w.method, w.credit) for w in windows],
                "in_flight": [w.in_flight for w in windows],
                "draft_ms": [w.draft_ms for w in windows],
                "rtt_ms": [w.rtt_ms for w in windows],
                "queue_ms": [w.queue_ms for w in windows],
                "verify_ms": [w.verify_ms for w in windows],
            }
        ),
        hide_index=True,
        placeholder="–",
        column_config={
            "at_s": column.NumberColumn("At, s", format="%.2f", help="Since the first feedback."),
            "proposed": column.NumberColumn("Tree, tokens", help=TERMS["tree"]),
            "drafted": column.NumberColumn("Drafted", help=TERMS[kind]),
            "accepted": column.NumberColumn("Accepted", help=TERMS["acceptance"]),
            "why": column.TextColumn("Feedback", help=TERMS["rollback"], width="large"),
            "threshold": column.NumberColumn("Threshold, nats", help=TERMS["threshold"]),
            "credit": column.NumberColumn("Credit", format="%.2f", help=TERMS["credit"]),
            "in_flight": column.NumberColumn(
                "In flight, tokens", help="Drafted and not judged when this feedback came."
            ),
            "draft_ms": column.NumberColumn("Draft, ms", format="%.0f"),
            "rtt_ms": column.NumberColumn("Link, ms", format="%.0f"),
            "queue_ms": column.NumberColumn("Queue, ms", format="%.0f"),
            "verify_ms": column.NumberColumn("Target, ms", format="%.0f"),
        },
        key="windows",
    )
