"""Rules that look at how far draft and target are apart, and not only at the token drawn.

    FSD     accept iff JSD(pᵢ ‖ qᵢ) ≤ T
    E²-SCI  accept iff exact verification does, or JSD(pᵢ ‖ qᵢ) ≤ T

At a rejection the target's own token follows; with residual coupling a draw from p (FSD) or from
norm(max(0, p − q)) (E²-SCI) [ours].
Both are lossy for T > 0. With T < 0 the second is exact verification, so T moves it between exact
and lenient. Divergences are of temperature-1 distributions at every temperature, in nats.
Formulas: docs/method.md, Acceptance.
"""

from __future__ import annotations

from bus.protocol.arrays import Float64Array
from decoding.acceptance import jensen_shannon
from decoding.engine import TargetRow
from decoding.methods.base import Proposal
from decoding.methods.exact import ExactRule
from decoding.sampling import SamplingParams, draw_dense
from decoding.uniforms import Purpose, uniform


def divergence(proposal: Proposal, row: TargetRow) -> float:
    """JSD(p₁ ‖ q₁) in nats, 0 … ln 2."""
    q1 = proposal.q1
    return jensen_shannon(row.p1_at_q[: q1.ids.size], q1.probs)


class DrawsFromTarget:
    """At a rejection the target's own distribution is drawn from: there is no residual."""

    def recover(
        self,
        proposal: Proposal,  # noqa: ARG002 - the target's distribution alone
        target: Float64Array,
        params: SamplingParams,
        position: int,
    ) -> int:
        return draw_dense(target, uniform(params.seed, position, Purpose.RESIDUAL))


class DivergenceRule(DrawsFromTarget):
    """Fuzzy speculative decoding (Holsman et al., 2025), with the textbook divergence."""

    lossless, compares = False, True
    every_child = entropy = False

    def accepts(
        self,
        proposal: Proposal,
        row: TargetRow,
        params: SamplingParams,  # noqa: ARG002 - the divergence alone decides
        position: int,  # noqa: ARG002
        threshold: float,
    ) -> bool:
        return divergence(proposal, row) <= threshold


class ElasticRule(ExactRule):
    """Exact verification, with tokens let through besides where draft and target are alike."""

    lossless, compares = False, True

    def accepts(
        self,
        proposal: Proposal,
        row: TargetRow,
        params: SamplingParams,
        position: int,
        threshold: float,
    ) -> bool:
        if super().accepts(proposal, row, params, position, threshold):
            return True
        return threshold >= 0.0 and divergence(proposal, row) <= threshold
