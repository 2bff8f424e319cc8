"""Acceptance's formulas in O(K) against their dense definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.arrays import Float64Array
from decoding.acceptance import (
    accepts_exactly,
    draw_residual,
    expected_accepted,
    jensen_shannon,
    overlap,
)
from decoding.sampling import SamplingParams, SparseDistribution, from_wire, warp_dense

VOCAB_SIZE = 40
PLAIN = SamplingParams(temperature=1.0)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Float64Array, SparseDistribution, Float64Array]:
    """p dense, q₁ sparse, and q₁ dense; either may be sharp or flat."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sharpness = draw(st.sampled_from([0.0, 1.0, 10.0, 60.0]))
    p = warp_dense(sharpness * generator.normal(size=VOCAB_SIZE), PLAIN)
    num_sparse = draw(st.integers(1, VOCAB_SIZE))
    likeness = draw(st.sampled_from([0.0, 0.9, 1.0]))
    other = warp_dense(sharpness * generator.normal(size=VOCAB_SIZE), PLAIN)
    mixed = likeness * p + (1 - likeness) * other
    ids = np.argsort(-mixed)[:num_sparse].astype(np.int32)
    q1 = from_wire(ids, np.maximum(mixed[ids], 2.0**-24).astype(np.float16))
    dense = np.zeros(VOCAB_SIZE)
    dense[q1.ids] = q1.probs
    return p, q1, dense


def kl(a: Float64Array, b: Float64Array) -> float:
    at = a > 0
    return float(np.sum(a[at] * np.log(a[at] / b[at])))


# --- divergences ------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_sparse_jensen_shannon_is_the_dense_one(
    pair: tuple[Float64Array, SparseDistribution, Float64Array],
) -> None:
    p, q1, dense = pair
    middle = (p + dense) / 2
    expected = (kl(p, middle) + kl(dense, middle)) / 2
    assert jensen_shannon(p[q1.ids], q1.probs) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_overlap_is_one_minus_the_total_variation(
    pair: tuple[Float64Array, SparseDistribution, Float64Array],
) -> None:
    p, q1, dense = pair
    expected = 1 - np.abs(p - dense).sum() / 2
    assert overlap(p[q1.ids], q1.probs) == pytest.approx(expected, abs=1e-12)


def test_divergence_ends() -> None:
    half = np.array([0.5, 0.5])
    assert jensen_shannon(half, half) == 0.0
    assert overlap(half, half) == 1.0
    nothing = np.zeros(2)
    assert jensen_shannon(nothing, half) == pytest.approx(np.log(2), abs=1e-15)
    assert jensen_shannon(nothing, half) <= np.log(2)
    assert overlap(nothing, half) == 0.0
    rounded_up = np.array([0.5, 0.5 + 1e-9])  # float32 probabilities may sum to more than one
    assert 0.0 <= jensen_shannon(rounded_up, half) < 1e-9


@pytest.mark.parametrize(
    ("overlaps", "expected"),
    [([], 0.0), ([0.5], 0.5), ([0.5, 0.5], 0.75), ([1.0] * 4, 4.0), ([0.0, 1.0], 0.0),
     ([0.9, 0.8, 0.5], 0.9 + 0.72 + 0.36)],
)  # fmt: skip
def test_expected_accepted_sums_the_chances_of_getting_that_far(
    overlaps: list[float], expected: float
) -> None:
    assert expected_accepted(overlaps) == pytest.approx(expected, abs=1e-15)


# --- the exact test and the residual ----------------------------------------------------------


@pytest.mark.parametrize(
    ("p_x", "q_x", "u", "expected"),
    [
        (0.5, 0.5, 1 - 2**-53, True),
        (0.6, 0.5, 1 - 2**-53, True),
        (0.25, 0.5, 0.5 - 2**-53, True),
        (0.25, 0.5, 0.5, False),  # u < p/q, and not u ≤ p/q
        (0.25, 0.5, 0.75, False),
        (0.0, 0.5, 0.0, False),  # what the target rules out never stands
        (0.1, 1.0, 0.0, True),
    ],
)
def test_a_token_stands_with_probability_p_over_q(
    p_x: float, q_x: float, u: float, expected: bool
) -> None:
    assert accepts_exactly(p_x, q_x, u) is expected


@settings(max_examples=100, deadline=None)
@given(pair=pairs(), u=st.floats(0, 1, exclude_max=True))
def test_the_residual_is_what_p_has_more_than_q(
    pair: tuple[Float64Array, SparseDistribution, Float64Array], u: float
) -> None:
    p, q1, dense = pair
    residual = np.clip(p - dense, 0, None)
    before = p.copy()
    token = draw_residual(p, q1, u)
    np.testing.assert_array_equal(p, before)  # the shell's row is not written to
    if residual.sum() > 1e-9:
        assert residual[token] > 0
        reached = np.cumsum(residual / residual.sum())
        assert reached[token] - residual[token] / residual.sum() - 1e-9 <= u < reached[token] + 1e-9
    else:
        assert p[token] > 0
