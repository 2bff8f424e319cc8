"""The page "Playground": a prompt through the real queue, its tokens in colour as they come; two
methods side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import streamlit as st

from bus.client import Client
from bus.protocol.errors import E2SCIError
from bus.protocol.messages import FinishReason
from dashboard.answers import StoredAnswer
from dashboard.charts import method_label
from dashboard.coloured import LEGEND, as_html
from dashboard.glossary import TERMS
from dashboard.settings import DashboardSettings
from dashboard.tiles import percent
from dashboard.views.shared import shared_answers
from decoding import methods
from decoding.methods.base import Control

_REFRESH_S = 0.4
_NOBODY = "nothing"
_SHOWN = "playground answers"
_CLIENT = "playground"
_DEFAULT = "auto"
T = TypeVar("T")


def draw(settings: DashboardSettings) -> None:
    """The page."""
    st.title("Playground")
    st.caption(
        "Type a prompt, choose how it is decoded, and watch which tokens the draft got right."
    )
    _ask(settings)
    shown: list[tuple[str, str]] = st.session_state.get(_SHOWN, [])
    if not shown:
        return
    st.html(LEGEND)
    running = not all(_is_over(settings, request) for _, request in shown)
    fragment = st.fragment(run_every=_REFRESH_S if running else None)(_draw_answers)
    fragment(settings, shown, running)


def offered_methods() -> list[str]:
    """All but those that explore for a calibration."""
    found = ((name, methods.find(name)) for name in methods.names())
    return [name for name, m in found if m is not None and m.control is not Control.EXPLORE]


def _ask(settings: DashboardSettings) -> None:
    names = offered_methods()
    with st.form("ask", border=True):
        prompt = st.text_area("Prompt", "Why is the sky blue? Answer in two sentences.", height=90)
        first, second, length, warmth = st.columns([2, 2, 1, 1])
        method = first.selectbox(
            "Method", names, index=names.index(_DEFAULT), format_func=method_label,
            help=f"{TERMS['lossless']} auto drafts where that is faster than the target alone, "
            "plc always drafts ahead, sd waits for each window.",
        )  # fmt: skip
        other = second.selectbox(
            "Compare with", [_NOBODY, *names],
            format_func=lambda name: name if name == _NOBODY else method_label(name),
            help="The same prompt and seed with another method, at the same time: they share the "
            "machine, so that each is slower than alone.",
        )  # fmt: skip
        tokens = length.number_input("Most tokens", 1, 2048, 64)
        temperature = warmth.number_input(
            "Temperature", 0.0, 100.0, 0.0, step=0.1,
            help="0: always the most probable token. Above, tokens are drawn.",
        )  # fmt: skip
        sent = st.form_submit_button("Generate", icon=":material/send:", type="primary")
    if not sent:
        return
    asked = [method] if other == _NOBODY else [method, other]

    async def submit(client: Client) -> list[tuple[str, str]]:
        return [
            (
                name,
                await client.submit(
                    prompt, method=name, max_new_tokens=int(tokens), temperature=temperature,
                    seed=1, client=_CLIENT,
                ),
            )
            for name in asked
        ]  # fmt: skip

    found = _call(settings, submit)
    if found is not None:
        st.session_state[_SHOWN] = found


def _draw_answers(settings: DashboardSettings, shown: list[tuple[str, str]], running: bool) -> None:
    over = []
    for column, (method, request) in zip(st.columns(len(shown), gap="medium"), shown, strict=True):
        with column:
            over.append(_draw_answer(settings, method, request))
    if running and all(over):
        st.rerun()  # the whole page once more, without a timer


def _draw_answer(settings: DashboardSettings, method: str, request: str) -> bool:
    """Whether it has ended."""
    st.markdown(f"##### {method_label(method)}")
    try:
        answer = shared_answers(settings).answer(request)
    except E2SCIError as error:
        st.error(f"{error}", icon=":material/cloud_off:")
        return False
    st.html(as_html(answer.pieces))
    if answer.end is None:
        waiting = answer.queue_state == "queued"
        st.caption("Waiting for an edge worker …" if waiting else "Writing …")
        if st.button("Cancel", key=f"cancel {request}", icon=":material/cancel:"):
            _call(settings, lambda client: client.cancel(request))
        return False
    _draw_end(answer)
    st.caption(f"Request `{request}`: the page Session shows its windows.")
    return True


def _draw_end(answer: StoredAnswer) -> None:
    end = answer.end
    assert end is not None
    if end.finish_reason is FinishReason.ERROR:
        st.error(end.error, icon=":material/error:")
        return
    usage = end.usage
    with st.container(horizontal=True, gap="small"):
        st.metric("Tokens per s", f"{usage.tokens_per_s:.1f}", help=TERMS["goodput"], border=True)
        accepted = usage.acceptance if usage.drafted_tokens else None
        st.metric("Acceptance", percent(accepted), help=TERMS["acceptance"], border=True)
        st.metric("Rollbacks", str(usage.rollbacks), help=TERMS["rollback"], border=True)
        st.metric("Tokens", str(usage.completion_tokens), border=True)
    steps = (
        f"{usage.accepted_steps} of {usage.steps} steps accepted, judged by {usage.judge}. "
        if usage.steps else ""
    )  # fmt: skip
    st.caption(f"{steps}Ended: {end.finish_reason}. {TERMS['finish reason']}")


def _is_over(settings: DashboardSettings, request: str) -> bool:
    try:
        return shared_answers(settings).answer(request).end is not None
    except E2SCIError:
        return False


def _call(settings: DashboardSettings, ask: Callable[[Client], Awaitable[T]]) -> T | None:
    """One exchange with the queue; what goes wrong is shown."""

    async def run() -> T:
        async with Client(settings=settings) as client:
            return await ask(client)

    try:
        return asyncio.run(run())
    except E2SCIError as error:
        st.error(f"{error}", icon=":material/error:")
        return None
