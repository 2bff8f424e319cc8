"""Logits → a `TargetRow`, the plain way: for engines that hand over whole rows, and as the
reference for those that reduce on their own device."""

from __future__ import annotations

import numpy as np

from bus.protocol.arrays import TOKEN_DTYPE, Float32Array, Float64Array
from decoding.coupling import choose
from decoding.engine import NO_PROBS, NUM_TOP, Choice, TargetRow, Want
from decoding.sampling import SamplingParams, warp_dense


def reduced(
    logits: Float64Array, want: Want, sampling: SamplingParams, hidden: Float32Array | None = None
) -> TargetRow:
    """What is wanted of a row.

    Args:
        logits: float64[V], V ≥ 2, real tokens only. hidden: float32[hidden], the state they were
        computed from.
    """
    peak, best = float(logits.max()), int(np.argmax(logits))
    log_sum_exp = peak + float(np.log(np.exp(logits - peak).sum()))
    log_p1 = logits - log_sum_exp
    p = warp_dense(logits, sampling)
    second, first = np.partition(logits, -2)[-2:]
    gap = float(first - second)
    choice = None
    if want.choice_at is not None and sampling.greedy:
        choice = Choice(best, gap)
    elif want.choice_at is not None:
        kept = None if sampling.untruncated else np.flatnonzero(p)
        choice = choose(logits, sampling.temperature, sampling.seed, want.choice_at, kept)
    scored = (*want.scored, *(() if choice is None else (choice.token,))) if want.top else ()
    order = np.lexsort((np.arange(logits.size), -logits))[:NUM_TOP]
    return TargetRow(
        argmax=best,
        p1_at_q=np.exp(log_p1[want.ids]),
        p_at_q=NO_PROBS if sampling.greedy else p[want.ids],
        p1_max=float(np.exp(log_p1[best])),
        log_sum_exp=log_sum_exp,
        gap=gap if want.gap else None,
        choice=choice,
        top=(order.astype(TOKEN_DTYPE), log_p1[order]) if want.top else None,
        full=p if want.full else None,
        hidden=hidden if want.hidden else None,
        entropy=_entropy(log_p1) if want.entropy else None,
        scored=tuple((token, float(log_p1[token])) for token in scored),
    )


def _entropy(log_probs: Float64Array) -> float:
    """−Σ p ln p in nats; a probability of 0 adds nothing."""
    probs = np.exp(log_probs)
    return -float(np.dot(probs, np.where(probs > 0.0, log_probs, 0.0)))
