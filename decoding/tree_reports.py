"""What is reported about a tree that a pass has judged, as `decoding.verification` does it for
windows: so credit and the dashboard see one report a pass."""

from __future__ import annotations

from msgspec import Struct

from bus.protocol.messages import Outcome, WindowReport
from decoding.acceptance import expected_accepted, jensen_shannon, overlap
from decoding.engine import TargetRow
from decoding.trees import ROOT, TreeJudge, Walked, children, depths
from decoding.verification import Reported, log_of


class JudgedTree(Struct, frozen=True):
    """A tree of which the path is known.

    Attributes:
        rows: n + 1, after the text and after each node.
        verify_ms: of the pass; share: of its rows that were this session's.
    """

    judge: TreeJudge
    walked: Walked
    rows: tuple[TargetRow, ...]
    verify_ms: float
    share: float = 1.0

    @property
    def depth(self) -> int:
        """Of the tree."""
        return max(depths(self.judge.tree.parents))

    @property
    def places(self) -> tuple[int, ...]:
        """Where the walk has been: after the text, then each accepted node."""
        return ROOT, *self.walked.path


def tree_report(judged: JudgedTree, whose: Reported, energy_j: float | None = None) -> WindowReport:
    """A tree as a window of its depth, of which the accepted path is the accepted part.

    E[L_acc] and the divergence are those along that path, the place of the rejection included, from
    the distribution that the first child was taken from; without distributions they are the number
    of accepted tokens, and none.
    """
    walked, num_accepted = judged.walked, len(judged.walked.path)
    expected, mean_jsd = float(num_accepted), None
    if judged.judge.rule.compares:
        overlaps, divergences = _likeness(judged)
        expected = expected_accepted(overlaps)
        mean_jsd = sum(divergences) / len(divergences)
    scored = _scored(judged)
    return WindowReport(
        session=whose.session,
        incarnation=whose.incarnation,
        number=0,
        edge=whose.edge,
        client=whose.client,
        method=whose.method,
        outcome=Outcome.ACCEPTED if num_accepted == judged.depth else Outcome.PARTIAL,
        num_drafted=judged.depth,
        num_accepted=num_accepted,
        num_own=0 if walked.own is None else 1,
        threshold=judged.judge.threshold,
        expected_accepted=expected,
        mean_jsd=mean_jsd,
        edge_ms=0.0,
        cloud_ms=judged.verify_ms,
        rework_ms=0.0,
        verify_ms=judged.verify_ms,
        queue_ms=0.0,
        energy_j=energy_j,
        num_scored=len(scored),
        log_likelihood=sum(log_of(prob) for prob, _, _ in scored),
        num_greedy=sum(first for _, _, first in scored),
        regret=sum(max(0.0, log_of(best) - log_of(prob)) for prob, best, _ in scored),
    )


def _likeness(judged: JudgedTree) -> tuple[list[float], list[float]]:
    """Overlap and divergence at each place of the path that has children."""
    judge, below = judged.judge, children(judged.judge.tree.parents)
    overlaps, divergences = list[float](), list[float]()
    for place in judged.places:
        if place in below:
            q1 = judge.proposal(below[place][0], judge.tree.q_ids[below[place][0]]).q1
            p1 = judged.rows[place + 1].p1_at_q[: q1.ids.size]
            overlaps.append(overlap(p1, q1.probs))
            divergences.append(jensen_shannon(p1, q1.probs))
    return overlaps, divergences


def _scored(judged: JudgedTree) -> list[tuple[float, float, bool]]:
    """Of the committed tokens whose probability the pass has shown: p₁, that of the first choice,
    and whether it is that; as `decoding.verification.committed_quality`."""
    judge, walked = judged.judge, judged.walked
    if judge.rule.lossless and not judge.sampling.greedy:
        return []
    wanted, scored = judge.wanted(), list[tuple[float, float, bool]]()
    for place, node in zip(judged.places, walked.path, strict=False):
        row, token = judged.rows[place + 1], judge.tree.tokens[node]
        first = token == row.argmax
        prob = row.p1_max if first else _prob(row, wanted[place + 1].tolist(), token)
        scored.append((prob, row.p1_max, first))
    if walked.own is not None and judge.sampling.greedy:
        last = judged.rows[judged.places[-1] + 1]
        scored.append((last.p1_max, last.p1_max, True))
    return scored


def _prob(row: TargetRow, ids: list[int], token: int) -> float:
    return float(row.p1_at_q[ids.index(token)])
