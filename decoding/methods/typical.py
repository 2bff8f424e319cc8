"""Typical acceptance (Cai et al., 2024, Medusa, arXiv 2401.10774): a token is accepted where it is
likely enough, measured by how unsure the target is.

    accept x  iff  p₁(x) > min(ε, α·exp(−H(p₁)))        ε = 0.09, α = 0.3

H is the entropy of the target's row in nats. Both are taken at temperature 1 in sessions of every
temperature [ours]: so the rule is defined at temperature 0 as well.
"""

from __future__ import annotations

import math

import numpy as np

from decoding.engine import TargetRow
from decoding.methods.base import Proposal
from decoding.methods.divergence import DrawsFromTarget
from decoding.sampling import SamplingParams

EPSILON, ALPHA = 0.09, 0.3
"""As published: the hard bound and the entropy-dependent one."""


def bound(entropy: float) -> float:
    """min(ε, α·exp(−H)) of a row with entropy H ≥ 0 in nats."""
    return min(EPSILON, ALPHA * math.exp(-entropy))


class TypicalRule(DrawsFromTarget):
    """Lossy at every temperature. The proposal's ids must hold its token."""

    lossless = compares = False
    every_child = entropy = True

    def accepts(
        self,
        proposal: Proposal,
        row: TargetRow,
        params: SamplingParams,  # noqa: ARG002 - temperature 1 always
        position: int,  # noqa: ARG002
        threshold: float,  # noqa: ARG002 - the row's entropy sets the bound
    ) -> bool:
        assert row.entropy is not None
        p_x = float(row.p1_at_q[np.flatnonzero(proposal.ids == proposal.token)[0]])
        return p_x > bound(row.entropy)
