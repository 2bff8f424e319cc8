"""Sampling parameters, and the two distributions a draft's K numbers stand for.

What the edge sends for a token are its top K temperature-1 probabilities as float16. Both ends
turn them into float64, drop zeros and divide by the exact sum: that is **q₁**, used for
divergences. Temperature, top-k and top-p applied to those entries give **q**, used for drawing
and for exact acceptance. Nothing is rounded afterwards, so what was sampled from is exactly what
was sent (docs/invariants.md, Sample from what is sent).

Order of the warpers is that of transformers: temperature, top-k, top-p.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bus.protocol.arrays import Float16Array, Float64Array, Int32Array
from bus.protocol.bounds import SessionCoupling

_ONE = np.ones(1)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen from logits.

    Attributes:
        temperature: 0 is greedy; above, logits are divided by it.
        top_p: keep the smallest set of most probable tokens whose mass reaches it; 1 is off.
        top_k: keep the k most probable tokens; 0 is off.
        seed: seed of `decoding.uniforms`.
        coupling: how draft and target share it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    coupling: SessionCoupling = SessionCoupling.GUMBEL

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def coupled(self) -> bool:
        """Whether the target's token at a position is known from the seed alone."""
        return self.greedy or self.coupling is SessionCoupling.GUMBEL

    @property
    def choosing(self) -> bool:
        """Whether that token is the choice of `decoding.coupling`, above temperature 0."""
        return self.coupled and not self.greedy

    @property
    def untruncated(self) -> bool:
        """Whether neither top-k nor top-p cut anything."""
        return self.top_k == 0 and self.top_p == 1.0

    @property
    def plain(self) -> bool:
        """Whether warping changes nothing: temperature 1, no truncation."""
        return self.temperature == 1.0 and self.untruncated


@dataclass(frozen=True, slots=True)
class SparseDistribution:
    """A distribution on a few tokens, in canonical order: probability falling, then id rising.

    Attributes:
        ids: int32[K], distinct token ids.
        probs: float64[K], positive, summing to 1.
    """

    ids: Int32Array
    probs: Float64Array

    def prob(self, token: int) -> float:
        """q(token), 0 for a token that is not listed."""
        hit = np.flatnonzero(self.ids == token)
        return float(self.probs[hit[0]]) if hit.size else 0.0

    def draw(self, u: float) -> int:
        """The token at cumulative probability `u` in [0, 1), in canonical order."""
        return int(self.ids[_inverse_cdf(self.probs, u)])

    @property
    def argmax(self) -> int:
        return int(self.ids[0])


def canonical(ids: Int32Array, probs: Float16Array) -> tuple[Int32Array, Float16Array]:
    """One row sorted as it travels: probability falling, then id rising.

    Args:
        ids: int32[K]. probs: float16[K].
    """
    order = np.lexsort((ids, -probs))
    return ids[order], probs[order]


def from_wire(ids: Int32Array, probs: Float16Array) -> SparseDistribution:
    """q₁ from one row as it was sent.

    The sum of float16 values is exact in float64 (at most 1,024 terms of 11 bits, spread over
    2⁻²⁴…1), so both ends divide by the very same number.

    Args:
        ids: int32[K]. probs: float16[K], in canonical order, the first above zero.
    """
    size = int(np.count_nonzero(probs))  # zeros stand at the end
    wide = probs[:size].astype(np.float64)
    return SparseDistribution(ids[:size], wide / wide.sum())


def warp(q1: SparseDistribution, params: SamplingParams) -> SparseDistribution:
    """q: q₁ under temperature, top-k and top-p. At temperature 0, one-hot on the argmax."""
    if params.greedy:
        return SparseDistribution(q1.ids[:1], _ONE)
    if params.plain:
        return q1
    ids, probs = q1.ids, q1.probs
    if params.temperature != 1.0:
        scaled = np.log(probs) / params.temperature
        probs = np.exp(scaled - scaled.max())
        probs = probs / probs.sum()
    keep = num_kept(probs, params)
    if keep < probs.size:
        ids, probs = ids[:keep], probs[:keep] / probs[:keep].sum()
    return SparseDistribution(ids, probs)


def num_kept(sorted_probs: Float64Array, params: SamplingParams) -> int:
    """How many of the probabilities, sorted falling, survive top-k and then top-p (at least 1)."""
    keep = int(sorted_probs.size)
    if params.top_k:
        keep = min(keep, params.top_k)
    if params.top_p < 1.0:
        mass = sorted_probs[:keep]
        reached = np.cumsum(mass / mass.sum())
        keep = min(keep, int(np.searchsorted(reached, params.top_p)) + 1)
    return max(keep, 1)


def warp_dense(logits: Float64Array, params: SamplingParams) -> Float64Array:
    """The target's p over the full vocabulary: softmax of warped logits.

    Args:
        logits: float64[V]. Returns float64[V] summing to 1 (one-hot at temperature 0).
    """
    if params.greedy:
        one_hot: Float64Array = np.zeros_like(logits)
        one_hot[int(np.argmax(logits))] = 1.0
        return one_hot
    scaled = logits / params.temperature
    probs: Float64Array = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    if params.untruncated:
        return probs
    order = np.lexsort((np.arange(probs.size), -probs))
    kept = order[: num_kept(probs[order], params)]
    warped: Float64Array = np.zeros_like(probs)
    warped[kept] = probs[kept] / probs[kept].sum()
    return warped


def draw_dense(probs: Float64Array, u: float) -> int:
    """The token at cumulative probability `u` in [0, 1), by rising id. `probs`: float64[V]."""
    return _inverse_cdf(probs, u)


def _inverse_cdf(probs: Float64Array, u: float) -> int:
    cumulative = np.cumsum(probs)
    index = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    if index >= probs.size or probs[index] <= 0:  # rounding at the far end
        index = int(np.flatnonzero(probs > 0)[-1])
    return index
