"""The seed's choice: as the plain formula says, distributed as p, shared by draft and target."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bus.protocol.arrays import Float64Array
from decoding.coupling import choose, choose_sparse, noise, noise_at
from decoding.engine import Want
from decoding.rows import reduced
from decoding.sampling import SamplingParams, SparseDistribution, warp_dense

NUM_DRAWS = 4000


def plain_scores(log_p: Float64Array, seed: int, position: int) -> Float64Array:
    scores: Float64Array = log_p - np.log(-np.log(noise(seed, position, log_p.size)))
    return scores


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 5000), spread=st.sampled_from([0.0, 0.1, 2.0, 30.0]),
    temperature=st.sampled_from([0.01, 0.8, 1.0, 1.7, 100.0]), seed=st.integers(0, 2**63 - 1),
    position=st.integers(0, 2**31 - 1), single=st.booleans(),
)  # fmt: skip
def test_the_short_way_gives_what_the_formula_gives(
    size: int, spread: float, temperature: float, seed: int, position: int, single: bool
) -> None:
    logits = spread * np.random.default_rng(seed).normal(size=size)
    logits = logits.astype(np.float32) if single else logits
    found = choose(logits, temperature, seed, position)
    scores = plain_scores(logits.astype(np.float64) / temperature, seed, position)
    first = int(np.argmax(scores))
    assert found.token == first
    if size > 1:
        assert found.gap == scores[first] - np.delete(scores, first).max()
    else:
        assert found.gap == float("inf")


def test_tokens_without_probability_are_never_chosen() -> None:
    logits = np.full(50, -np.inf)
    logits[7] = 0.0
    assert {choose(logits, 1.0, seed, 3).token for seed in range(20)} == {7}
    logits[[3, 9]] = -1.0, 2.0
    assert {choose(logits, 1.0, seed, 3).token for seed in range(200)} == {3, 7, 9}


def test_of_equal_scores_the_lowest_id_wins() -> None:
    seed = next(s for s in range(100_000) if np.diff(noise(s, 1, 2))[0] > 0)
    by = float(np.diff(plain_scores(np.zeros(2), seed, 1))[0])
    assert choose(np.zeros(2), 1.0, seed, 1).token == 1
    assert choose(np.array([2 * by, 0.0]), 1.0, seed, 1).token == 0


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1), st.integers(1, 200_000))
def test_single_ids_have_the_numbers_of_the_whole_vocabulary(
    seed: int, position: int, size: int
) -> None:
    ids = np.unique(np.array([0, size // 3, size - 1], dtype=np.int32))
    np.testing.assert_array_equal(noise_at(seed, position, ids), noise(seed, position, size)[ids])


@pytest.mark.parametrize("lag", [0, 1, 4, 8])
def test_noise_is_independent_across_positions_and_ids(lag: int) -> None:
    """Neighbouring positions, at the same ids and some ids on."""
    table = np.stack([noise(11, position, 400) for position in range(60)])
    pairs = [(table[:-1], table[1:]), (table[:, : 400 - lag or None], table[:, lag:])]
    pairs.append((table[:-1, lag:], table[1:, : 400 - lag or None]))
    for one, other in pairs if lag else pairs[:1]:
        x, y = one.ravel(), other.ravel()
        assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / x.size**0.5
    assert stats.kstest(table.ravel(), "uniform").pvalue > 1e-4


HOW = [
    SamplingParams(temperature, top_p, top_k)
    for temperature in (0.3, 0.8, 1.0, 1.2)
    for top_p, top_k in ((1.0, 0), (0.9, 0), (1.0, 3), (0.8, 5))
]


@pytest.mark.parametrize("sampling", HOW, ids=str)
def test_choices_are_distributed_as_p(sampling: SamplingParams) -> None:
    """Chi-square over positions, of the row that an engine reduces."""
    logits = np.array([1.0, 0.2, 2.0, -0.5, 1.5, 1.5, -2.0, 0.9])
    p = warp_dense(logits, sampling)
    counts = np.zeros(p.size)
    for position in range(NUM_DRAWS):
        row = reduced(logits, Want(0, choice_at=position), sampling)
        assert row.choice is not None
        counts[row.choice.token] += 1
    assert counts[p == 0].sum() == 0
    kept = p * NUM_DRAWS >= 5
    seen, expected = counts[kept], p[kept] * NUM_DRAWS
    rest = NUM_DRAWS - expected.sum()
    if rest > 1e-6:
        seen, expected = np.append(seen, counts[~kept].sum()), np.append(expected, rest)
    if seen.size > 1:
        assert stats.chisquare(seen, expected).pvalue > 1e-4


def test_draft_and_target_agree_as_often_as_the_theory_promises() -> None:
    """At least (1 − TV)/(1 + TV); a draft that is the target agrees always, also where its rows
    know only a part of the vocabulary."""
    generator = np.random.default_rng(3)
    for spread in (0.0, 0.3, 1.0):
        logits = 2 * generator.normal(size=30)
        others = logits + spread * generator.normal(size=30)
        p, q = warp_dense(logits, SamplingParams(1.0)), warp_dense(others, SamplingParams(1.0))
        order = np.lexsort((np.arange(30), -q)).astype(np.int32)
        sparse = SparseDistribution(order, q[order])
        agreed = np.mean(
            [choose_sparse(sparse, 5, at) == choose(logits, 1.0, 5, at).token for at in range(2000)]
        )
        tv = 0.5 * float(np.abs(p - q).sum())
        assert agreed == 1.0 if spread == 0.0 else agreed > (1 - tv) / (1 + tv) - 0.04
