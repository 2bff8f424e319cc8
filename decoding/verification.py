"""What waits to be judged at the cloud, and what is reported about it afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from bus.protocol.arrays import PROB_DTYPE, Float16Array, Int32Array
from bus.protocol.messages import DraftWindow, Outcome, WindowReport
from decoding.acceptance import expected_accepted, jensen_shannon, overlap
from decoding.draft_tree import Place
from decoding.engine import NO_IDS, ProposedTree, TargetRow, Want
from decoding.methods.base import AcceptanceRule, Proposal
from decoding.sampling import SamplingParams

OWN_PASSES = 32
"""Passes of the target by itself that one report adds up [ours]."""
_NO_SENT_PROBS: Float16Array = np.empty(0, PROB_DTYPE)


class Arrived(Struct, frozen=True):
    """A window, when it came, and its tokens with what they were drawn from."""

    message: DraftWindow
    arrived_ms: float
    proposals: tuple[Proposal, ...]


def arrived(message: DraftWindow, now_ms: float, sampling: SamplingParams) -> Arrived:
    """A window that has come just now."""
    tokens = message.token_ids
    if message.rows is None:
        alone = tuple(Proposal(token, NO_IDS, _NO_SENT_PROBS, sampling) for token in tokens)
        return Arrived(message, now_ms, alone)
    rows = zip(tokens, message.q_id_rows, message.q_prob_rows, strict=True)
    proposals = tuple(Proposal(token, ids, probs, sampling) for token, ids, probs in rows)
    return Arrived(message, now_ms, proposals)


def own_token(row: TargetRow) -> int:
    """What the target itself writes here."""
    return row.argmax if row.choice is None else row.choice.token


class Test(Struct, frozen=True):
    """Of one drafted token by the target's row.

    Attributes:
        position: absolute, of the token.
    """

    rule: AcceptanceRule
    proposal: Proposal
    sampling: SamplingParams
    position: int
    threshold: float

    def passes(self, row: TargetRow) -> bool:
        """Whether the token is accepted: by the rule, or because it is what the target would put in
        its place."""
        if self.rule.accepts(self.proposal, row, self.sampling, self.position, self.threshold):
            return True
        return self.sampling.coupled and own_token(row) == self.proposal.token


class PreHit(Struct, frozen=True):
    """The test of a drafted token by the row kept from the pass before, the same as in a pass.

    Attributes:
        index: of the kept row among the last pass's rows. features, top: as in `Plan`.
    """

    index: int
    test: Test
    features: bool = False
    top: bool = False

    @property
    def want(self) -> Want:
        """What of the kept row the test needs."""
        test = self.test
        choice_at = None if test.sampling.greedy else test.position
        return Want(
            0, test.proposal.ids, choice_at, top=self.top, entropy=test.rule.entropy,
            features=self.features, scored=(test.proposal.token,) if self.top else (),
        )  # fmt: skip


class Plan(Struct, frozen=True):
    """What a pass runs, and what of its rows is wanted.

    Attributes:
        feed: tokens to run, none where the session has moved on.
        row_ids: for each of the last rows, the token ids whose probabilities are wanted.
        choices_at: for each of them the absolute position at which the target's own choice is
            wanted, or None.
        path: the drafted tokens that are verified.
        prehit: judges the first of them by the kept row; where it rejects, nothing is run.
        top, entropy, features: of each row the most probable tokens, its entropy, the features of
            its position are wanted too.
        scored: for each of the rows the drafted tokens that may follow it, where `top` is wanted.
        most: tokens that a speculator may propose after the feed; 0: none is asked.
        tree: what it has proposed, at the end of the feed; parents: of each token of the feed then,
            as in `decoding.engine.Segment`.
    """

    feed: tuple[int, ...] = ()
    row_ids: tuple[Int32Array, ...] = ()
    choices_at: tuple[int | None, ...] = ()
    path: tuple[Place[Arrived], ...] = ()
    prehit: PreHit | None = None
    top: bool = False
    entropy: bool = False
    most: int = 0
    tree: ProposedTree | None = None
    parents: tuple[int, ...] = ()
    features: bool = False
    scored: tuple[tuple[int, ...], ...] = ()


class Judged(Struct, frozen=True):
    """A window of which all that will ever be judged has been.

    Attributes:
        reached: leading tokens that the target had reached by itself before they came, and that
            are the same.
        rows: the target's, one for each token after those that a pass has judged, and maybe one
            after them.
        num_accepted: accepted leading tokens, `reached` included; own: what the target wrote after
            them in the same pass.
        verify_ms: of that pass, 0 where there was none; pass_tokens: its length if it began with
            this window, else 0; share: of the pass's rows that were this session's.
    """

    window: Arrived
    reached: int
    num_accepted: int
    outcome: Outcome
    threshold: float
    done_ms: float
    rows: tuple[TargetRow, ...] = ()
    own: int | None = None
    verify_ms: float = 0.0
    pass_tokens: int = 0
    share: float = 1.0

    @property
    def queue_ms(self) -> float:
        """Time the window waited for the model, from arrival."""
        return max(0.0, self.done_ms - self.verify_ms - self.window.arrived_ms)


class OwnPasses(Struct, frozen=True):
    """Passes that the target ran by itself, added up.

    Attributes:
        model_ms: the session's share of their time. logs: ln p₁ of the tokens, summed over those
            of which it is known.
    """

    num_tokens: int = 0
    model_ms: float = 0.0
    num_scored: int = 0
    log_likelihood: float = 0.0

    def added(self, row: TargetRow, model_ms: float, greedy: bool) -> OwnPasses:
        """With one more."""
        return replace(
            self,
            num_tokens=self.num_tokens + 1,
            model_ms=self.model_ms + model_ms,
            num_scored=self.num_scored + greedy,
            log_likelihood=self.log_likelihood + (log_of(row.p1_max) if greedy else 0.0),
        )


class Reported(Struct, frozen=True):
    """Whose a report is."""

    session: str
    incarnation: int
    edge: str
    client: str
    method: str


def window_report(judged: Judged, whose: Reported, energy_j: float | None = None) -> WindowReport:
    """What is reported: divergences and E[L_acc] over all positions of the window.

    `energy_j` is that of the target pass, counted with the window that it began with.

    A window of which nothing was run counts as expected length 0 beyond what the target had
    reached; where the kept row has rejected it, its divergence is that of its first token. One
    without distributions counts its accepted tokens, and has no divergence.
    """
    message = judged.window.message
    expected, mean_jsd = float(judged.num_accepted), None
    if message.rows is not None and judged.rows:
        expected, mean_jsd = _likeness(judged)
    quality = committed_quality(judged)
    return WindowReport(
        session=whose.session,
        incarnation=whose.incarnation,
        number=message.number,
        edge=whose.edge,
        client=whose.client,
        method=whose.method,
        outcome=judged.outcome,
        num_drafted=message.num_tokens,
        num_accepted=judged.num_accepted,
        num_own=0 if judged.own is None else 1,
        threshold=judged.threshold,
        expected_accepted=expected,
        mean_jsd=mean_jsd,
        edge_ms=0.0 if message.rows is None else message.rows.edge_ms,
        cloud_ms=max(0.0, judged.done_ms - judged.window.arrived_ms),
        rework_ms=0.0 if message.rows is None else message.rows.rework_ms,
        verify_ms=judged.verify_ms,
        queue_ms=judged.queue_ms,
        energy_j=energy_j,
        num_scored=quality.num_tokens,
        log_likelihood=quality.log_likelihood,
        num_greedy=quality.num_greedy,
        regret=quality.regret,
    )


def own_report(own: OwnPasses, whose: Reported, energy_j: float | None = None) -> WindowReport:
    """The report of passes that the target ran by itself."""
    return WindowReport(
        session=whose.session, incarnation=whose.incarnation, number=0, edge=whose.edge,
        client=whose.client, method=whose.method, outcome=Outcome.OWN, num_drafted=0,
        num_accepted=0, num_own=own.num_tokens, threshold=0.0, expected_accepted=0.0,
        mean_jsd=None, edge_ms=0.0, cloud_ms=own.model_ms, rework_ms=0.0, verify_ms=own.model_ms,
        queue_ms=0.0, energy_j=energy_j, num_scored=own.num_scored,
        log_likelihood=own.log_likelihood, num_greedy=own.num_scored, regret=0.0,
    )  # fmt: skip


def _judged_pairs(judged: Judged) -> Iterable[tuple[Proposal, TargetRow]]:
    return zip(judged.window.proposals[judged.reached :], judged.rows, strict=False)


def _likeness(judged: Judged) -> tuple[float, float]:
    """E[L_acc] and the mean divergence, of a window that came with distributions."""
    pairs = [
        (row.p1_at_q[: proposal.q1.ids.size], proposal.q1.probs)
        for proposal, row in _judged_pairs(judged)
    ]
    divergences = [jensen_shannon(p1, q1) for p1, q1 in pairs]
    prehit = judged.outcome is Outcome.PREHIT_REJECTED
    overlaps = [1.0] * judged.reached + ([] if prehit else [overlap(p1, q1) for p1, q1 in pairs])
    return expected_accepted(overlaps), sum(divergences) / len(divergences)


LEAST_PROBABILITY = 1e-30
"""What float32 has rounded to 0 counts as this."""


def log_of(prob: float) -> float:
    """ln of a probability, in nats; never −∞."""
    return math.log(min(max(prob, LEAST_PROBABILITY), 1.0))


@dataclass(frozen=True, slots=True)
class WindowQuality:
    """Of committed tokens, by the target's rows: see `WindowReport`."""

    num_tokens: int
    log_likelihood: float
    num_greedy: int
    regret: float


def committed_quality(judged: Judged) -> WindowQuality:
    """Of the tokens that a window commits and whose probability its pass has shown.

    What follows them is the target's argmax at temperature 0, and drawn from a row that nobody
    keeps above it. Without the draft's distributions nobody asks for single probabilities: at
    temperature 0 accepted tokens are the argmax, above it none is scored.
    """
    greedy = judged.window.proposals[0].sampling.greedy
    if judged.window.message.rows is None and not greedy:
        return WindowQuality(0, 0.0, 0, 0.0)
    accepted = list(_judged_pairs(judged))[: judged.num_accepted - judged.reached]
    probs = [(_prob_of(proposal, row), row.p1_max) for proposal, row in accepted]
    num_greedy = sum(proposal.token == row.argmax for proposal, row in accepted)
    after = judged.rows[len(accepted) : len(accepted) + 1]
    if after and judged.own == after[0].argmax and greedy:
        probs.append((after[0].p1_max, after[0].p1_max))
        num_greedy += 1
    logs = [(log_of(prob), log_of(best)) for prob, best in probs]
    return WindowQuality(
        len(probs),
        sum(log for log, _ in logs),
        num_greedy,
        sum(max(0.0, best - log) for log, best in logs),
    )


def _prob_of(proposal: Proposal, row: TargetRow) -> float:
    if not proposal.ids.size:
        return row.p1_max
    return float(row.p1_at_q[np.flatnonzero(proposal.ids == proposal.token)[0]])
