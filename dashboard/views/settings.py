"""The page "Settings": what the controller uses, and other numbers for it while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import streamlit as st

from bus.protocol.bounds import (
    GAIN,
    HOLD,
    MEMORY,
    NATS,
    SMOOTHING,
    THRESHOLD,
    WINDOW,
    Bounds,
)
from bus.protocol.errors import E2SCIError
from bus.store import InUse, Store, Tuning
from dashboard.glossary import TERMS
from dashboard.settings import DashboardSettings
from dashboard.views.shared import clock

T = TypeVar("T")
_SEEN, _FORM = "tuning seen", "tuning form"


def _real(bounds: Bounds, step: float, decimals: int) -> dict[str, Any]:
    """Limits of a field for a number; the least one is a step above a bound that is excluded."""
    least = step * 0.2 if bounds.above else float(bounds.low)
    limits = {"min_value": least, "max_value": float(bounds.high), "step": step}
    return limits | {"format": f"%.{decimals}f"}


def _whole(bounds: Bounds) -> dict[str, Any]:
    return {"min_value": int(bounds.low), "max_value": int(bounds.high), "step": 1}


_NATS = _real(NATS, 0.01, 3)
_FIELDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "base_threshold": ("T_base, nats", f"Threshold at neutral credit. {TERMS['threshold']}", _NATS),
    "least_threshold": ("T_min, nats", "Least threshold; also the conservative one.", _NATS),
    "greatest_threshold": ("T_max, nats", "Greatest threshold that credit may ask for.", _NATS),
    "credit_gain": (
        "α_s, gain", f"Nats that the threshold moves for each unit of credit. {TERMS['credit']}",
        _real(GAIN, 0.1, 2),
    ),
    "credit_smoothing": (
        "β, smoothing", "Weight of the newest window in credit.",
        _real(SMOOTHING, 0.05, 2),
    ),
    "credit_memory": (
        "k, memory in windows", "Windows that credit remembers.",
        _whole(MEMORY),
    ),
    "threshold_band": ("Band, nats", "A change smaller than this is not made.", _NATS),
    "threshold_hold": (
        "Hold, windows", "Windows between two changes of the threshold.",
        _whole(HOLD),
    ),
    "threshold": (
        "Fixed threshold, nats", "Of lossy methods whose threshold stays, such as fsd.",
        _real(THRESHOLD, 0.01, 3),
    ),
    "window": (
        "Fixed window, tokens", f"{TERMS['window']} Of methods under the fixed policy.",
        _whole(WINDOW),
    ),
}  # fmt: skip


def draw(settings: DashboardSettings) -> None:
    """The page."""
    st.title("Settings")
    st.caption(
        "What the controller uses. Changes hold for running sessions too, from their next windows "
        "on, until they are changed again or the wish is withdrawn."
    )
    found = _ask(settings, _read)
    if found is None:
        return
    in_use, wish = found
    if in_use is None:
        st.info(
            "No controller of this release has said what it uses: start one with `e2sci up`.",
            icon=":material/tune:",
        )
        return
    _draw_state(in_use)
    wanted = _form(in_use.tuning, wish)
    if wanted is not None:
        _send(settings, wanted)
    if in_use.tuning != in_use.own and st.button(
        "Back to what it was started with", icon=":material/undo:"
    ):
        _ask(settings, lambda store: store.tunings.withdraw())
        _await_controller(settings)


async def _read(store: Store) -> tuple[InUse | None, bytes]:
    return await store.tunings.in_use(), await store.tunings.wish()


def _draw_state(in_use: InUse) -> None:
    if in_use.problem:
        st.error(f"The latest wish is not taken over: {in_use.problem}", icon=":material/error:")
    changed = [
        name for name in Tuning.__struct_fields__
        if getattr(in_use.tuning, name) != getattr(in_use.own, name)
    ]  # fmt: skip
    if not changed:
        st.success(f"As it was started, since {clock(in_use.at)}.", icon=":material/check:")
        return
    told = ", ".join(
        f"{_FIELDS[name][0]} {getattr(in_use.tuning, name):g} (was {getattr(in_use.own, name):g})"
        for name in changed
    )
    st.success(f"In use since {clock(in_use.at)}: {told}.", icon=":material/check:")


def _form(now: Tuning, wish: bytes) -> Tuning | None:
    """What is sent, if it is; the wish that stood when the form was drawn is remembered."""
    values: dict[str, float | int] = {}
    with st.form(_FORM):
        for names in (list(_FIELDS)[:3], list(_FIELDS)[3:6], list(_FIELDS)[6:]):
            for column, name in zip(st.columns(len(names)), names, strict=True):
                label, text, limits = _FIELDS[name]
                values[name] = column.number_input(
                    label, value=getattr(now, name), help=text, key=f"tuning {name}", **limits
                )
        sent = st.form_submit_button("Use these", icon=":material/send:", type="primary")
    if not sent:
        st.session_state[_SEEN] = wish
        return None
    return msgspec.convert(values, Tuning)


def _send(settings: DashboardSettings, wanted: Tuning) -> None:
    if not wanted.least_threshold <= wanted.base_threshold <= wanted.greatest_threshold:
        st.error("Expected T_min ≤ T_base ≤ T_max.", icon=":material/error:")
        return
    seen = st.session_state.get(_SEEN, b"")
    written = _ask(settings, lambda store: store.tunings.ask(wanted, seen))
    if written is False:
        st.error(
            "Somebody else has changed the settings meanwhile. Reload the page to see them; "
            "nothing was overwritten.",
            icon=":material/group:",
        )
    elif written:
        _await_controller(settings)


def _await_controller(settings: DashboardSettings) -> None:
    """Until the controller has looked, at most for some seconds; then the page anew."""

    async def answered(store: Store) -> bool:
        before = await store.tunings.in_use()
        for _ in range(30):
            await asyncio.sleep(0.1)
            now = await store.tunings.in_use()
            if now != before:
                return True
        return False

    with st.spinner("Waiting for the controller …"):
        heard = _ask(settings, answered)
    if heard:
        for name in _FIELDS:
            st.session_state.pop(f"tuning {name}", None)
        st.rerun()
    st.warning("The controller has not answered yet; it takes the wish over when it is back.")


def _ask(settings: DashboardSettings, ask: Callable[[Store], Awaitable[T]]) -> T | None:
    """One exchange with Redis; what goes wrong is shown."""

    async def run() -> T:
        store = await Store.connect(settings)
        try:
            return await ask(store)
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except E2SCIError as error:
        st.error(f"{error}", icon=":material/cloud_off:")
        return None
