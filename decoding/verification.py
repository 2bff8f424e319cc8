"""A window under judgement at the cloud, and what the controller is told about it afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from msgspec import Struct

from bus.protocol.messages import DraftWindow, Feedback, Outcome, WindowReport
from decoding.acceptance import expected_accepted, jensen_shannon, overlap
from decoding.engine import TargetRow, Want
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
            first and the cached row rejected it.
        share: of the pass's rows that were this session's.
    """

    arrived: Arrived
    proposals: tuple[Proposal, ...]
    rows: tuple[TargetRow, ...] = ()
    verify_ms: float = 0.0
    done_ms: float = 0.0
    rejected_at: int | None = None
    pass_tokens: int = 0
    prehit_failed: bool = False
    share: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.proposals[0].sampling.greedy

    @property
    def has_rows(self) -> bool:
        """Whether the window came with the draft's probabilities."""
        return bool(self.proposals[0].ids.size)

    @property
    def queue_ms(self) -> float:
        """Time the window waited for the model, from arrival."""
        return max(0.0, self.done_ms - self.verify_ms - self.arrived.arrived_ms)


class PreHit(Struct, frozen=True):
    """The test of a window's first token by the row kept from the pass before.

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

    @property
    def want(self) -> Want:
        """What of the kept row the test needs."""
        choice_at = self.position if self.sampling.choosing else None
        return Want(0, self.proposal.ids, choice_at)

    def passes(self, row: TargetRow) -> bool:
        """The same test, with the same random numbers, as in full verification."""
        return self.rule.accepts(self.proposal, row, self.sampling, self.position, self.threshold)


def window_report(
    verification: Verification,
    feedback: Feedback,
    edge: str,
    client: str,
    method: str,
    energy_j: float | None = None,
) -> WindowReport:
    """What the controller is told: divergences and E[L_acc] over all positions of the window.

    `energy_j` is that of the target pass, counted with the window that it began with.

    A window rejected at pre-hit counts as expected length 0, and its divergence is
    that of its first token. One without distributions counts its accepted tokens, and has no
    divergence.
    """
    message = verification.arrived.message
    if verification.has_rows:
        expected, mean_jsd = _likeness(verification, feedback.outcome is Outcome.PREHIT_REJECTED)
    else:
        expected, mean_jsd = float(feedback.num_accepted), None
    quality = committed_quality(verification, feedback)
    return WindowReport(
        feedback=feedback,
        edge=edge,
        client=client,
        method=method,
        expected_accepted=expected,
        mean_jsd=mean_jsd,
        num_drafted=message.num_tokens,
        edge_ms=message.edge_ms,
        cloud_ms=verification.done_ms - verification.arrived.arrived_ms,
        rework_ms=message.rework_ms,
        energy_j=energy_j,
        num_scored=quality.num_tokens,
        log_likelihood=quality.log_likelihood,
        num_greedy=quality.num_greedy,
        regret=quality.regret,
    )


def _likeness(verification: Verification, prehit: bool) -> tuple[float, float]:
    """E[L_acc] and the mean divergence, of a window that came with distributions."""
    pairs = [
        (row.p1_at_q[: proposal.q1.ids.size], proposal.q1.probs)
        for row, proposal in zip(verification.rows, verification.proposals, strict=False)
    ]
    divergences = [jensen_shannon(p1, q1) for p1, q1 in pairs]
    overlaps = [] if prehit else [overlap(p1, q1) for p1, q1 in pairs]
    return expected_accepted(overlaps), sum(divergences) / len(divergences)


LEAST_PROBABILITY = 1e-30
"""What float32 has rounded to 0 counts as this."""


@dataclass(frozen=True, slots=True)
class WindowQuality:
    """Of committed tokens, by the target's rows: see `WindowReport`."""

    num_tokens: int
    log_likelihood: float
    num_greedy: int
    regret: float


def committed_quality(verification: Verification, feedback: Feedback) -> WindowQuality:
    """Of the tokens that a window commits and whose probability its pass has shown.

    What follows them is the target's argmax at temperature 0, and drawn from a row that nobody
    keeps above it. Without the draft's distributions nobody asks for single probabilities: at
    temperature 0 accepted tokens are the argmax, above it none is scored.
    """
    if not verification.has_rows and not verification.greedy:
        return WindowQuality(0, 0.0, 0, 0.0)
    accepted = list(zip(verification.rows, verification.proposals, strict=False))
    accepted = accepted[: feedback.num_accepted]
    probs = [(_prob_of(proposal, row), row.p1_max) for row, proposal in accepted]
    num_greedy = sum(proposal.token == row.argmax for row, proposal in accepted)
    behind = verification.rows[len(accepted) : len(accepted) + 1]
    if behind and feedback.next_token == behind[0].argmax and verification.greedy:
        probs.append((behind[0].p1_max, behind[0].p1_max))
        num_greedy += 1
    logs = [(_log(prob), _log(best)) for prob, best in probs]
    return WindowQuality(
        len(probs),
        sum(log for log, _ in logs),
        num_greedy,
        sum(max(0.0, best - log) for log, best in logs),
    )


def _log(prob: float) -> float:
    return math.log(min(max(prob, LEAST_PROBABILITY), 1.0))


def _prob_of(proposal: Proposal, row: TargetRow) -> float:
    if not proposal.ids.size:
        return row.p1_max
    return float(row.p1_at_q[np.flatnonzero(proposal.ids == proposal.token)[0]])
