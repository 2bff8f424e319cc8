"""q₁ and q against plain dense references, and against transformers' own warpers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bus.protocol.arrays import Float16Array, Float64Array, Int32Array
from decoding.sampling import (
    SamplingParams,
    SparseDistribution,
    canonical,
    draw_dense,
    from_wire,
    num_kept,
    warp,
    warp_dense,
)

LAST_BELOW_ONE = 1.0 - 2.0**-53
TINIEST_F16 = 2.0**-24

wire_probs = st.lists(
    st.floats(0, 1, width=16).map(np.float16), min_size=1, max_size=48
).filter(any)  # fmt: skip
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.5, 3.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.integers(0, 12),
)
logits = st.lists(st.integers(-400, 400), min_size=1, max_size=12, unique=True).map(
    lambda steps: np.array(steps) / 50.0  # no two closer than 0.02: no ties to break
)


def row(probs: list[Any]) -> tuple[Int32Array, Float16Array]:
    """As it travels; the token at place i of `probs` is 3i + 1."""
    ids = np.arange(len(probs), dtype=np.int32) * 3 + 1
    return canonical(ids, np.array(probs, dtype=np.float16))


def warped_plainly(probs: Float64Array, how: SamplingParams) -> Float64Array:
    """float64[V] → float64[V], one rule after the other, each as its definition says."""
    if how.temperature == 0:
        best = max(range(probs.size), key=lambda i: (probs[i], -i))
        return np.array([float(i == best) for i in range(probs.size)])
    weights = [float(p) ** (1 / how.temperature) if p > 0 else 0.0 for p in probs]
    ranked = sorted(range(probs.size), key=lambda i: (-weights[i], i))
    if how.top_k:
        ranked = ranked[: how.top_k]
    total = math.fsum(weights[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        kept.append(i)
        mass += weights[i] / total
        if how.top_p < 1 and mass >= how.top_p:
            break
    result = np.zeros(probs.size)
    for i in kept:
        result[i] = weights[i] / math.fsum(weights[j] for j in kept)
    return result


def clear_of_ties(probs: Float64Array, how: SamplingParams) -> bool:
    """Whether no rounding can decide how many tokens top-p keeps."""
    if how.greedy or how.top_p == 1.0:
        return True
    weights = np.sort(probs ** (1 / how.temperature))[::-1]
    weights = weights[: how.top_k or None]
    reached = np.cumsum(weights / weights.sum())
    return bool(np.abs(reached - how.top_p).min() > 1e-9)


# --- q₁ ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(wire_probs)
def test_q1_is_what_was_sent_over_its_exact_sum(sent: list[Any]) -> None:
    ids, probs = row(sent)
    q1 = from_wire(ids, probs)
    total = math.fsum(float(p) for p in sent)  # exact
    for token, p in zip(ids, probs, strict=True):
        assert q1.prob(int(token)) == float(p) / total
    assert q1.probs.dtype == np.float64
    assert (q1.probs > 0).all()
    assert q1.probs.sum() == pytest.approx(1.0, abs=1e-14)


@settings(max_examples=100, deadline=None)
@given(sent=wire_probs, order=st.randoms(use_true_random=False))
def test_canonical_order_does_not_depend_on_the_order_before(sent: list[Any], order: Any) -> None:
    ids, probs = row(sent)
    shuffled = list(range(len(sent)))
    order.shuffle(shuffled)
    for one, other in zip((ids, probs), canonical(ids[shuffled], probs[shuffled]), strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=50, deadline=None)
@given(wire_probs)
def test_q1_stands_in_canonical_order(sent: list[Any]) -> None:
    q1 = from_wire(*row(sent))
    keys = [(-p, i) for p, i in zip(q1.probs.tolist(), q1.ids.tolist(), strict=True)]
    assert keys == sorted(keys)
    assert q1.argmax == q1.ids[0]


def test_zeros_are_dropped_and_the_smallest_float16_is_not() -> None:
    q1 = from_wire(*row([0.0, 1.0, TINIEST_F16, 0.0]))
    assert q1.ids.tolist() == [4, 7]
    assert q1.prob(7) == TINIEST_F16 / (1.0 + TINIEST_F16)
    assert q1.prob(1) == q1.prob(999) == 0.0


def test_the_sum_of_many_float16_is_exact() -> None:
    probs = np.array([1.0, TINIEST_F16] * 512, dtype=np.float16)
    q1 = from_wire(np.arange(1024, dtype=np.int32), probs)
    assert q1.probs[0] == 1.0 / (512 + 512 * TINIEST_F16)


# --- q ----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(sent=wire_probs, how=params)
def test_q_is_q1_warped_rule_by_rule(sent: list[Any], how: SamplingParams) -> None:
    ids, probs = row(sent)
    q1 = from_wire(ids, probs)
    dense = np.array([q1.prob(int(i)) for i in ids])
    assume(clear_of_ties(dense, how))
    q = warp(q1, how)
    expected = warped_plainly(dense, how)
    got = np.array([q.prob(int(i)) for i in ids])
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-300)
    assert q.probs.sum() == pytest.approx(1.0, abs=1e-12)
    assert q.argmax == q1.argmax


def test_nothing_to_warp_changes_nothing() -> None:
    q1 = from_wire(*row([0.5, 0.25, 0.1]))
    assert warp(q1, SamplingParams(temperature=1.0)) is q1
    assert SamplingParams(1.0).plain
    assert not any(
        how.plain
        for how in (SamplingParams(), SamplingParams(0.9), SamplingParams(1.0, top_p=0.9),
                    SamplingParams(1.0, top_k=3))
    )  # fmt: skip


def test_at_temperature_zero_q_is_certain_of_the_lowest_of_equals() -> None:
    q = warp(from_wire(*row([0.1, 0.4, 0.4])), SamplingParams())
    assert (q.ids.tolist(), q.probs.tolist()) == ([4], [1.0])
    assert SamplingParams().greedy
    assert not SamplingParams(0.01).greedy


# --- the target's p ---------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(values=logits, how=params)
def test_p_is_the_softmax_warped_rule_by_rule(values: Float64Array, how: SamplingParams) -> None:
    softmax = np.exp(values) / np.exp(values).sum()
    assume(clear_of_ties(softmax, how))
    got = warp_dense(values, how)
    np.testing.assert_allclose(got, warped_plainly(softmax, how), rtol=1e-9)
    assert got.sum() == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(values=logits, how=params)
def test_both_warps_are_one_and_the_same(values: Float64Array, how: SamplingParams) -> None:
    """The draft's q is the target's rule on fewer tokens: else nothing would ever be accepted."""
    probs = (np.exp(values) / np.exp(values).sum()).astype(np.float16)
    assume(probs.any())
    q1 = from_wire(*canonical(np.arange(values.size, dtype=np.int32), probs))
    dense = np.full(values.size, -np.inf)
    dense[q1.ids] = np.log(q1.probs)
    assume(clear_of_ties(np.exp(dense), how))
    q, p = warp(q1, how), warp_dense(dense, how)
    np.testing.assert_allclose([q.prob(i) for i in range(values.size)], p, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(values=logits, how=params.filter(lambda how: not how.greedy))
def test_warpers_and_their_order_are_those_of_transformers(
    values: Float64Array, how: SamplingParams
) -> None:
    import torch
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    assume(clear_of_ties(np.exp(values), how))
    scores, nothing = torch.tensor(values)[None], torch.zeros((1, 1), dtype=torch.long)
    scores = TemperatureLogitsWarper(how.temperature)(nothing, scores)
    if how.top_k:
        scores = TopKLogitsWarper(how.top_k)(nothing, scores)
    if how.top_p < 1.0:
        scores = TopPLogitsWarper(how.top_p)(nothing, scores)
    theirs = torch.softmax(scores, dim=-1)[0].numpy()
    np.testing.assert_allclose(warp_dense(values, how), theirs, rtol=1e-9)


def test_huge_logits_do_not_overflow() -> None:
    values = np.array([5e4, 5e4 - 1, -5e4])
    got = warp_dense(values, SamplingParams(temperature=0.01))
    assert np.isfinite(got).all()
    assert got[0] == pytest.approx(1.0)


def test_of_equal_tokens_the_lower_ids_are_kept() -> None:
    kept = warp_dense(np.zeros(5), SamplingParams(1.0, top_k=2))
    assert kept.tolist() == [0.5, 0.5, 0, 0, 0]


@pytest.mark.parametrize(
    ("probs", "top_p", "top_k", "expected"),
    [
        ([0.5, 0.3, 0.2], 1.0, 0, 3),
        ([0.5, 0.3, 0.2], 1.0, 2, 2),
        ([0.5, 0.3, 0.2], 1.0, 9, 3),
        ([0.5, 0.25, 0.25], 0.5, 0, 1),  # reached exactly is reached
        ([0.5, 0.25, 0.25], 0.51, 0, 2),
        ([0.5, 0.25, 0.25], 0.75, 0, 2),
        ([0.5, 0.25, 0.25], 0.01, 0, 1),  # never none
        ([0.5, 0.25, 0.25], 0.66, 2, 1),  # of the two that top-k left: 2/3 and 1/3
        ([0.5, 0.25, 0.25], 0.67, 2, 2),
        ([1.0], 0.5, 1, 1),
    ],
)
def test_how_many_tokens_survive(
    probs: list[float], top_p: float, top_k: int, expected: int
) -> None:
    how = SamplingParams(temperature=1.0, top_p=top_p, top_k=top_k)
    assert num_kept(np.array(probs), how) == expected


# --- drawing ----------------------------------------------------------------------------------

GRID = [(i + 0.5) / 4096 for i in range(4096)]


@settings(max_examples=30, deadline=None)
@given(wire_probs)
def test_every_token_is_drawn_as_often_as_its_probability_says(sent: list[Any]) -> None:
    q = from_wire(*row(sent))
    drawn = np.searchsorted(np.cumsum(q.probs), GRID, side="right")
    for u, index in list(zip(GRID, drawn, strict=True))[::97]:
        assert q.draw(u) == q.ids[min(index, q.ids.size - 1)]
    dense = np.zeros(200)
    dense[q.ids] = q.probs
    counts = np.bincount([draw_dense(dense, u) for u in GRID[::16]], minlength=200) / 256
    np.testing.assert_allclose(counts, dense, atol=1 / 256 + 1e-9)


def test_intervals_are_closed_below_and_open_above() -> None:
    q = SparseDistribution(np.array([8, 3, 5], dtype=np.int32), np.array([0.5, 0.25, 0.25]))
    edges = {0.0: 8, 0.5 - 2**-53: 8, 0.5: 3, 0.75 - 2**-53: 3, 0.75: 5, LAST_BELOW_ONE: 5}
    assert {u: q.draw(u) for u in edges} == edges
    dense = np.array([0.25, 0.25, 0.5])
    edges = {0.0: 0, 0.25: 1, 0.5: 2, LAST_BELOW_ONE: 2}
    assert {u: draw_dense(dense, u) for u in edges} == edges


@pytest.mark.parametrize("u", [0.0, 0.3, 0.5, 0.9999, LAST_BELOW_ONE])
def test_impossible_tokens_are_never_drawn(u: float) -> None:
    for zeros in itertools.product([0, 3], repeat=3):
        probs = np.array([0.0] * zeros[0] + [0.5] + [0.0] * zeros[1] + [0.5] + [0.0] * zeros[2])
        assert probs[draw_dense(probs, u)] > 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-12, 1), min_size=1, max_size=300), st.floats(0, LAST_BELOW_ONE))
def test_rounding_never_draws_beyond_the_end(weights: list[float], u: float) -> None:
    probs = np.array([*weights, 0.0])
    assert probs[draw_dense(probs / probs.sum(), u)] > 0
    assert probs[draw_dense(probs, LAST_BELOW_ONE)] > 0  # the sum need not be one
