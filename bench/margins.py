"""How near a sampled decision was to falling otherwise (docs/invariants.md, Exactness)."""

from __future__ import annotations

from typing import Any

import numpy as np

from bus.protocol.arrays import Float64Array
from decoding.acceptance import accepts_exactly
from decoding.engine import Drafter, Want
from decoding.sampling import SamplingParams, from_wire, warp
from decoding.uniforms import Purpose, uniform
from engines.torch.target import TargetModel


def decision_margin(
    target: TargetModel, draft: Drafter[Any], prefix: tuple[int, ...], params: SamplingParams
) -> float:
    """Least distance of a uniform to a boundary, in the decisions about the token after `prefix`.

    The decisions are the draft's draw, acceptance and, at a rejection, the residual draw. Models
    that sum in another order move boundaries by about 1e-5.
    """
    draft_cache, target_cache = draft.open(params), target.open(params)
    draft.prefill(draft_cache, prefix[:-1])
    target.prefill(target_cache, prefix[:-1])
    window = draft.draft(draft_cache, prefix[-1:], 1, frozenset(), stop=lambda: False)
    q1 = from_wire(window.q_ids[0], window.q_probs[0])
    q, token = warp(q1, params), window.tokens[0]
    rows, _ = target.forward(target_cache, prefix[-1:], [q1.ids])
    p_x = float(rows[0].p_at_q[np.flatnonzero(q1.ids == token)[0]])
    q_x = q.prob(token)
    position = len(prefix)
    u_accept = uniform(params.seed, position, Purpose.ACCEPT)
    margins = [
        _distance(q.probs, uniform(params.seed, position, Purpose.DRAFT)),
        abs(u_accept - p_x / q_x),
    ]
    if not accepts_exactly(p_x, q_x, u_accept):
        residual = target.row(target_cache, 0, Want(0, full=True)).full
        assert residual is not None
        residual[q.ids] -= q.probs
        residual = np.maximum(residual, 0.0)
        u = uniform(params.seed, position, Purpose.RESIDUAL)
        margins.append(_distance(residual / residual.sum(), u))
    return min(margins)


def _distance(probs: Float64Array, u: float) -> float:
    """From `u` to the nearest boundary of the inverse CDF's intervals."""
    cumulative = np.cumsum(probs)[:-1]
    return float(np.abs(cumulative - u).min()) if cumulative.size else 1.0
