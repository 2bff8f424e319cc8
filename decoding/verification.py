"""A window under judgement at the cloud, and what the controller is told about it afterwards."""

from __future__ import annotations

from msgspec import Struct

from bus.messages import DraftWindow, Feedback, WindowReport
from decoding.acceptance import TargetRow, expected_accepted, jensen_shannon, overlap
from decoding.methods.base import Proposal


class Arrived(Struct, frozen=True):
    """A window and when it came."""

    message: DraftWindow
    arrived_ms: float


class Verification(Struct, frozen=True):
    """A window under judgement.

    Attributes:
        rows: the target's, one for each proposal and maybe one behind them.
        rejected_at: index of the first rejected token, once known.
    """

    arrived: Arrived
    proposals: tuple[Proposal, ...]
    rows: tuple[TargetRow, ...] = ()
    verify_ms: float = 0.0
    done_ms: float = 0.0
    rejected_at: int | None = None

    @property
    def queue_ms(self) -> float:
        """Time the window waited for the model, from arrival."""
        return max(0.0, self.done_ms - self.verify_ms - self.arrived.arrived_ms)


def window_report(
    verification: Verification, feedback: Feedback, edge: str, client: str, method: str
) -> WindowReport:
    """What the controller is told: divergences and E[L_acc] over all positions of the window."""
    pairs = [
        (row.p1_at_q[: proposal.q1.ids.size], proposal.q1.probs)
        for row, proposal in zip(verification.rows, verification.proposals, strict=False)
    ]
    divergences = [jensen_shannon(p1, q1) for p1, q1 in pairs]
    message = verification.arrived.message
    return WindowReport(
        feedback=feedback,
        edge=edge,
        client=client,
        method=method,
        expected_accepted=expected_accepted([overlap(p1, q1) for p1, q1 in pairs]),
        mean_jsd=sum(divergences) / len(divergences),
        num_drafted=message.num_tokens,
        edge_ms=message.edge_ms,
        cloud_ms=verification.done_ms - verification.arrived.arrived_ms,
        rework_ms=message.rework_ms,
        energy_j=None,
    )
