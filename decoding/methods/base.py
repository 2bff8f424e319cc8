"""What a method is: an acceptance rule, a pace, and who controls threshold and window."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from bus.arrays import Float64Array
from decoding.acceptance import TargetRow
from decoding.sampling import SamplingParams, SparseDistribution


@dataclass(frozen=True, slots=True)
class Proposal:
    """One drafted token and the two distributions behind it (`decoding.sampling`)."""

    token: int
    q1: SparseDistribution
    q: SparseDistribution


class AcceptanceRule(Protocol):
    """Decides about one drafted token, and what stands in for the first rejected one."""

    lossless: bool

    def accepts(
        self,
        proposal: Proposal,
        row: TargetRow,
        params: SamplingParams,
        position: int,
        threshold: float,
    ) -> bool:
        """Whether the token at absolute `position` stands. Pure: same arguments, same answer."""
        ...

    def recover(
        self, proposal: Proposal, target: Float64Array, params: SamplingParams, position: int
    ) -> int:
        """The token in place of a rejected one, above temperature 0.

        Args:
            target: float64[V], the target's warped distribution at `position`.
        """
        ...


class Pace(Protocol):
    """How far the edge drafts ahead of feedback, and what the cloud runs of a window."""

    name: str

    def num_to_draft(self, window: int, greedy: bool, num_in_flight: int) -> int:
        """Tokens to draft now, with so many windows unanswered; 0 means wait for feedback."""
        ...

    def commits_bonus(self, greedy: bool) -> bool:
        """Whether full acceptance also commits the target's next token (DESIGN rule 5)."""
        ...


class Control(StrEnum):
    """Who sets threshold and window."""

    FIXED = "fixed"


@dataclass(frozen=True, slots=True)
class Method:
    """A decoding method.

    Attributes:
        name: as users write it.
        summary: one line for help texts.
    """

    name: str
    summary: str
    acceptance: AcceptanceRule
    pace: Pace
    control: Control

    @property
    def lossless(self) -> bool:
        """Whether the text is the target's own (DESIGN rule 6)."""
        return self.acceptance.lossless
