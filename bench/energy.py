"""Energy of an answer: modelled from busy and idle time, where no counter measures it.

    E = Σ over edge and cloud of  idle_w·T + (busy_w − idle_w)·T_busy

T is the whole answer, T_busy the time in which that side ran its model; the prompt counts as busy
on both. Baselines that run on one side keep it busy throughout. Counters (`engines.energy`) measure
the machine's processors and graphics cards together, so they hold where nothing else runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from bus.store import Usage


@dataclass(frozen=True, slots=True)
class Power:
    """Watts of one side while its model runs and while it does not. The default is one core of a
    server processor: 180 W over 32 cores when busy [ours]."""

    busy_w: float = 5.6
    idle_w: float = 1.4

    def joules(self, seconds: float, busy_s: float) -> float:
        return self.idle_w * seconds + (self.busy_w - self.idle_w) * min(busy_s, seconds)


@dataclass(frozen=True, slots=True)
class PowerModel:
    """Both sides."""

    edge: Power = Power()
    cloud: Power = Power()

    def alone_j(self, seconds: float, on_edge: bool) -> float:
        """Joules of an answer that one side gave by itself: busy throughout, the other idle."""
        edge_s, cloud_s = (seconds, 0.0) if on_edge else (0.0, seconds)
        return self.edge.joules(seconds, edge_s) + self.cloud.joules(seconds, cloud_s)

    def answer_j(
        self, seconds: float, first_token_s: float, decode_s: float, usage: Usage
    ) -> float:
        """Joules of an answer that edge and cloud gave together in `seconds`."""
        edge_s = first_token_s + (1.0 - usage.edge_idle) * decode_s
        cloud_s = first_token_s + (1.0 - usage.cloud_idle) * decode_s
        return self.edge.joules(seconds, edge_s) + self.cloud.joules(seconds, cloud_s)
