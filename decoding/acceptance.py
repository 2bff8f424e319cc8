"""Acceptance: which drafted tokens are accepted, and what replaces the first that does not.

Vocabulary: an *accepted* token was drafted and becomes part of the text; an *own* token is what
the target itself puts there: after a rejection, after a pass accepted in full, or without any
draft. With residual coupling a *recovered* token, drawn from the residual, replaces the first
rejected one.

Exact verification (Leviathan et al., 2023): accept x drawn from q with probability
min(1, p(x)/q(x)); at a rejection draw from norm(max(0, p − q)). The committed token is then
distributed exactly as p. At temperature 0 both collapse to argmax equality.
"""

from __future__ import annotations

import numpy as np

from bus.protocol.arrays import Float64Array
from decoding.sampling import SparseDistribution, draw_dense


def accepts_exactly(p_x: float, q_x: float, u: float) -> bool:
    """The exact test: u < p(x)/q(x), written without the division.

    Args:
        p_x, q_x: probability of the drafted token under warped target and warped draft, q_x > 0.
        u: the uniform (seed, position, ACCEPT).
    """
    return u * q_x < p_x


def draw_residual(p: Float64Array, q: SparseDistribution, u: float) -> int:
    """Draw from norm(max(0, p − q)).

    Args:
        p: float64[V], warped target. q: warped draft. u: the uniform (seed, position, RESIDUAL).
    """
    residual = p.copy()
    residual[q.ids] -= q.probs
    np.maximum(residual, 0.0, out=residual)
    if residual.sum() <= 0.0:  # p = q up to rounding: a rejection there has probability zero
        residual = p
    return draw_dense(residual, u)


def overlap(p1_at_q: Float64Array, q1: Float64Array) -> float:
    """1 − TV(p₁, q₁) = Σ_S min(p₁, q₁): q₁ is zero outside its support S.

    The expected acceptance of exact verification at temperature 1 (docs/method.md, Credit).
    """
    return float(np.minimum(p1_at_q, q1).sum())


def jensen_shannon(p1_at_q: Float64Array, q1: Float64Array) -> float:
    """JSD(p₁ ‖ q₁) in nats, in O(K) (docs/method.md, Acceptance).

    ½ Σ_S [p ln(2p/(p+q)) + q ln(2q/(p+q))] + ½ ln 2 · (1 − p(S)): outside the support S of q₁
    each p contributes ½ p ln 2.
    """
    both = p1_at_q + q1
    with np.errstate(divide="ignore", invalid="ignore"):
        p_part = np.where(p1_at_q > 0, p1_at_q * np.log(2 * p1_at_q / both), 0.0)
    q_part = q1 * np.log(2 * q1 / both)
    tail = max(0.0, 1.0 - float(p1_at_q.sum()))
    value = 0.5 * float(p_part.sum() + q_part.sum()) + 0.5 * np.log(2.0) * tail
    return float(min(max(value, 0.0), np.log(2.0)))


def expected_accepted(overlaps: list[float]) -> float:
    """E[L_acc] = Σᵢ Πⱼ≤ᵢ aⱼ with aⱼ = 1 − TV(pⱼ, qⱼ) (docs/method.md, Credit)."""
    return float(np.cumprod(overlaps).sum()) if overlaps else 0.0
