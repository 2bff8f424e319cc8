"""Bounds of numbers that are set in several places: settings, messages, forms, command options.

Each type below serves msgspec and pydantic alike; the `Bounds` beside it is for forms and options.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from msgspec import Meta
from pydantic import Field

__all__ = [
    "GAIN",
    "HOLD",
    "MAX_LOGPROBS",
    "MEMORY",
    "NATS",
    "SMOOTHING",
    "THRESHOLD",
    "WINDOW",
    "Bounds",
    "Gain",
    "Hold",
    "Memory",
    "Nats",
    "Port",
    "SessionCoupling",
    "Smoothing",
    "Threshold",
    "Window",
]


MAX_LOGPROBS = 20
"""Most alternatives whose log-probabilities are given for a token [as OpenAI's API]."""


class SessionCoupling(StrEnum):
    """How a session couples the draft's tokens with the target's (docs/method.md, Coupling).

    `GUMBEL`: the target's token is a function of seed and position; a drafted token is accepted
    where it is that one. `RESIDUAL`: rejection sampling, with the draft's probabilities.
    """

    GUMBEL = "gumbel"
    RESIDUAL = "residual"


@dataclass(frozen=True, slots=True)
class Bounds:
    """`low` … `high`, both allowed but where `above` excludes `low`."""

    low: float
    high: float
    above: bool = False

    @property
    def meta(self) -> Meta:
        """For msgspec."""
        if self.above:
            return Meta(gt=self.low, le=self.high)
        return Meta(ge=self.low, le=self.high)

    @property
    def field(self) -> Any:
        """For pydantic."""
        if self.above:
            return Field(gt=self.low, le=self.high)
        return Field(ge=self.low, le=self.high)


THRESHOLD = Bounds(-1, 1)
"""Of acceptance, in nats; below 0 is exact verification."""
NATS = Bounds(0, 0.69)
"""Of thresholds that credit moves: a divergence is at most ln 2."""
WINDOW = Bounds(1, 256)
"""Tokens of a window."""
GAIN = Bounds(0, 100)
"""α_s."""
SMOOTHING = Bounds(0, 1, above=True)
"""β."""
MEMORY = Bounds(1, 1000)
"""k, in windows."""
HOLD = Bounds(0, 1000)
"""Windows between two changes of the threshold."""
PORT = Bounds(0, 65535)
"""TCP; 0 takes a free one."""

Threshold = Annotated[float, THRESHOLD.meta, THRESHOLD.field]
Nats = Annotated[float, NATS.meta, NATS.field]
Window = Annotated[int, WINDOW.meta, WINDOW.field]
Gain = Annotated[float, GAIN.meta, GAIN.field]
Smoothing = Annotated[float, SMOOTHING.meta, SMOOTHING.field]
Memory = Annotated[int, MEMORY.meta, MEMORY.field]
Hold = Annotated[int, HOLD.meta, HOLD.field]
Port = Annotated[int, PORT.meta, PORT.field]
