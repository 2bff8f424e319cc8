"""Paces: lockstep drafts one window and waits for its feedback; PLC drafts on meanwhile, `auto`
where that is predicted to be faster; the draft of AMUSD never stops."""

from __future__ import annotations

from decoding.draft_tree import MAX_WINDOWS
from decoding.methods.base import Flow, PaceView
from decoding.pacing import MAX_MESSAGE, Forecast

MIN_ROOM, MAX_ROOM = 0.5, 2.0
"""Bounds of the budget as multiples of the bandwidth-delay product [ours]; the upper one is the
factor by which BBR's window exceeds its own, for delays that vary."""
STAY_AHEAD = 1.1
"""How much faster lockstep must be predicted before a full pipeline is drained for it [ours]."""

LEAST_GAIN = 1.03
"""How much faster drafting must be predicted before anything is drafted [ours]."""
PROBE, PROBE_MS = 4, 2000.0
"""Where it does not pay, so many tokens are drafted after so long without any [ours]."""
NOTHING = Flow(message=0, budget=0, awaits=False)

MOST_UNJUDGED = MAX_WINDOWS
"""Tokens in flight of a draft that never stops, a window each: what the cloud keeps [ours]."""


class Lockstep:
    """One window in flight; the target's own token follows it.

    Args:
        window: W, whatever the controller says; None leaves it to the controller.
    """

    name = "lockstep"
    forecasts = False

    def __init__(self, window: int | None = None) -> None:
        self.window = window

    def flow(self, view: PaceView) -> Flow:
        return _lockstep(view.window if self.window is None else self.window)


def _lockstep(window: int) -> Flow:
    return Flow(message=window, budget=window, awaits=True)


class Ahead:
    """Progressive lookahead (docs/method.md): draft and target do not wait for each other.

    Message: of 1 … 4 tokens, whichever is predicted fastest: short ones let the target begin
    early, long ones save hand-overs. Budget: one bandwidth-delay product times Π(1 + η_j) over
    the feedbacks since the last rollback, its own included; within half and twice that product,
    and never beyond the token from which on drafting can only lose (`decoding.pacing`). Before
    everything has been measured, and wherever lockstep is predicted faster, it is lockstep, with
    the window predicted fastest.
    """

    name = "plc"
    forecasts = True

    def flow(self, view: PaceView) -> Flow:
        forecast = view.forecast
        if forecast is None:
            return _lockstep(view.window)
        favour = STAY_AHEAD if view.ahead else 1.0
        if forecast.lockstep > forecast.ahead * favour:
            return _lockstep(forecast.window)
        return Flow(forecast.message, _budget(forecast, view.growth), awaits=False)


def _budget(forecast: Forecast, growth: float) -> int:
    room = min(max(growth, MIN_ROOM), MAX_ROOM) * forecast.bdp
    return max(forecast.message + 1, min(round(room), forecast.useful))


class WherePaying:
    """For a target that runs on by itself: as `Ahead`, where that is predicted to be faster than
    nothing at all; and with rescue branches (`decoding.rescue`).

    What the target takes alone is measured first, by not drafting for a few passes. Where drafts do
    not pay, a window is drafted now and then all the same, to see whether that has changed.

    Args:
        rescues: whether there are rescue branches.
    """

    name = "auto"
    forecasts = True

    def __init__(self, rescues: bool = True) -> None:
        self._rescues = rescues

    def flow(self, view: PaceView) -> Flow:
        forecast = view.forecast
        if forecast is None:
            return Flow(view.window, view.window, awaits=False)
        if forecast.alone_ms is None:
            return NOTHING
        if forecast.drafting_ms * LEAST_GAIN <= forecast.alone_ms:
            budget = _budget(forecast, view.growth)
            rescue = forecast.rescue if self._rescues else None
            return Flow(forecast.message, budget, awaits=False, rescue=rescue)
        if view.idle_ms >= PROBE_MS:
            return Flow(PROBE, PROBE, awaits=False)
        return NOTHING


class AheadLiterally:
    """The paper read to the letter: W_t^P = W_t · Π_{j=1}^{l_t} (1 + η_j), kept to compare.

    The budget starts, and after a rollback starts over, at the controller's W, whatever link and
    models take; it never falls back to lockstep.
    """

    name = "plc-literal"
    forecasts = False

    def flow(self, view: PaceView) -> Flow:
        budget = max(1, round(view.window * view.growth))
        return Flow(min(view.window, MAX_MESSAGE), budget, awaits=False)


class Continuous:
    """A token a message, and the next one at once, whatever has been answered (AMUSD).

    It stops only at `MOST_UNJUDGED` tokens, beyond which the cloud would drop some.
    """

    name = "continuous"
    forecasts = False

    def flow(self, view: PaceView) -> Flow:  # noqa: ARG002 - nothing changes it
        return Flow(1, MOST_UNJUDGED, awaits=False)


class Resting:
    """The edge drafts nothing: the target's speculator proposes, and the edge reads."""

    name = "resting"
    forecasts = False

    def flow(self, view: PaceView) -> Flow:
        del view
        return NOTHING


class Given:
    """For drafts that are there already and cost nothing: what is in flight is bounded alone, so
    that little is verified after the first token that the target writes otherwise [ours].

    Args:
        message: tokens a window. budget: most tokens in flight.
    """

    name = "given"
    forecasts = False

    def __init__(self, message: int = 8, budget: int = 16) -> None:
        self._flow = Flow(message, budget, awaits=False)

    def flow(self, view: PaceView) -> Flow:
        del view
        return self._flow
