"""A window under judgement at the cloud, and what the controller is told about it afterwards."""

from __future__ import annotations

from msgspec import Struct

from bus.messages import DraftWindow, Feedback, Outcome, WindowReport
from decoding.acceptance import TargetRow, expected_accepted, jensen_shannon, overlap
from decoding.methods.base import AcceptanceRule, Proposal
from decoding.sampling import SamplingParams


class Arrived(Struct, frozen=True):
    """A window and when it came."""

    message: DraftWindow
    arrived_ms: float


class Verification(Struct, frozen=True):
    """A window under judgement.

    Attributes:
        rows: the target's, one for each proposal and maybe one behind them.
        verify_ms: of the pass that gave them; `pass_tokens` its length if it began with this
            window, else 0.
        rejected_at: index of the first rejected token, once known; `prehit_failed` if it was the
            first and the kept row has told.
    """

    arrived: Arrived
    proposals: tuple[Proposal, ...]
    rows: tuple[TargetRow, ...] = ()
    verify_ms: float = 0.0
    done_ms: float = 0.0
    rejected_at: int | None = None
    pass_tokens: int = 0
    prehit_failed: bool = False

    @property
    def queue_ms(self) -> float:
        """Time the window waited for the model, from arrival."""
        return max(0.0, self.done_ms - self.verify_ms - self.arrived.arrived_ms)


class PreHit(Struct, frozen=True):
    """The test of a window's first token by the row kept from the pass before (DESIGN rule 4).

    Attributes:
        index: of the kept row among the last pass's rows.
        position: absolute, of the token.
    """

    index: int
    rule: AcceptanceRule
    proposal: Proposal
    sampling: SamplingParams
    position: int
    threshold: float

    def passes(self, row: TargetRow) -> bool:
        """The same test, with the same random numbers, as in full verification."""
        return self.rule.accepts(self.proposal, row, self.sampling, self.position, self.threshold)


def window_report(
    verification: Verification, feedback: Feedback, edge: str, client: str, method: str
) -> WindowReport:
    """What the controller is told: divergences and E[L_acc] over all positions of the window.

    A window rejected at pre-hit counts as expected length 0 (PAPER.md §1), and its divergence is
    that of its first token.
    """
    pairs = [
        (row.p1_at_q[: proposal.q1.ids.size], proposal.q1.probs)
        for row, proposal in zip(verification.rows, verification.proposals, strict=False)
    ]
    divergences = [jensen_shannon(p1, q1) for p1, q1 in pairs]
    message = verification.arrived.message
    prehit = feedback.outcome is Outcome.PREHIT_REJECTED
    overlaps = [] if prehit else [overlap(p1, q1) for p1, q1 in pairs]
    return WindowReport(
        feedback=feedback,
        edge=edge,
        client=client,
        method=method,
        expected_accepted=expected_accepted(overlaps),
        mean_jsd=sum(divergences) / len(divergences),
        num_drafted=message.num_tokens,
        edge_ms=message.edge_ms,
        cloud_ms=verification.done_ms - verification.arrived.arrived_ms,
        rework_ms=message.rework_ms,
        energy_j=None,
    )
