"""The exact acceptance rule: a drafted token is accepted where it is the target's own; with
residual coupling above temperature 0, rejection sampling."""

from __future__ import annotations

import numpy as np

from bus.protocol.arrays import Float64Array
from decoding.acceptance import accepts_exactly, draw_residual
from decoding.engine import TargetRow
from decoding.methods.base import Proposal
from decoding.sampling import SamplingParams
from decoding.uniforms import Purpose, uniform


class ExactRule:
    """The committed tokens are the target's own; with rejection sampling (Leviathan et al., 2023)
    they are distributed as those."""

    lossless = True
    compares = every_child = entropy = False

    def accepts(
        self,
        proposal: Proposal,
        row: TargetRow,
        params: SamplingParams,
        position: int,
        threshold: float,  # noqa: ARG002 - exact verification knows no threshold
    ) -> bool:
        if params.greedy:
            return proposal.token == row.argmax
        if params.choosing:
            assert row.choice is not None
            return proposal.token == row.choice.token
        p_x = float(row.p_at_q[np.flatnonzero(proposal.ids == proposal.token)[0]])
        u = uniform(params.seed, position, Purpose.ACCEPT)
        return accepts_exactly(p_x, proposal.q.prob(proposal.token), u)

    def recover(
        self, proposal: Proposal, target: Float64Array, params: SamplingParams, position: int
    ) -> int:
        u = uniform(params.seed, position, Purpose.RESIDUAL)
        return draw_residual(target, proposal.q, u)
