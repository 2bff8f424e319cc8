"""Control policies: how threshold and window of a session follow what was reported about it.

A policy is a pure function of state and report, so its law can be tested with a table of cases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from bus.protocol.messages import WindowReport


@dataclass(frozen=True, slots=True)
class ControlState:
    """What a policy decided for one session.

    Attributes:
        threshold: divergence in nats up to which lossy rules accept.
        window: drafted tokens a window (W).
        credit, credit_delta: the smoothed acceptance r̂ and its last change Δr̂ (docs/method.md,
        Credit).
        version: rises with every change; (term, version) orders updates.
        history: p_acc − τ of the latest windows, newest last (`decoding.credit`).
        held: windows since the threshold last changed. drop: the cumulative sum of drops.
    """

    threshold: float
    window: int
    credit: float = 0.0
    credit_delta: float = 0.0
    version: int = 1
    history: tuple[float, ...] = ()
    held: int = 0
    drop: float = 0.0


class Policy(Protocol):
    """Decides threshold and window."""

    def initial(self, history: tuple[float, ...] = ()) -> ControlState:
        """For a new session; `history` is that of its client's session before, if it is kept."""
        ...

    def after(self, state: ControlState, report: WindowReport) -> ControlState:
        """After one more judged window; the same object where nothing changes."""
        ...


@dataclass(frozen=True, slots=True)
class FixedPolicy:
    """Threshold and window from settings, whatever is reported.

    A session whose state was kept from other settings takes the present ones over.
    """

    threshold: float
    window: int

    def initial(self, history: tuple[float, ...] = ()) -> ControlState:  # noqa: ARG002
        return ControlState(self.threshold, self.window)

    def after(self, state: ControlState, report: WindowReport) -> ControlState:  # noqa: ARG002
        if (state.threshold, state.window) == (self.threshold, self.window):
            return state
        return replace(
            state, threshold=self.threshold, window=self.window, version=state.version + 1
        )
