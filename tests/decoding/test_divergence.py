"""The rules that look at divergence: FSD as published, and exact-or-alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.bounds import SessionCoupling
from decoding.engine import TargetRow
from decoding.methods.base import Proposal
from decoding.methods.divergence import DivergenceRule, ElasticRule, divergence
from decoding.methods.exact import ExactRule
from decoding.sampling import SamplingParams, draw_dense, warp_dense
from decoding.uniforms import Purpose, uniform

GREEDY = SamplingParams()
RESIDUAL = SessionCoupling.RESIDUAL
SAMPLED = SamplingParams(temperature=0.7, seed=5, coupling=RESIDUAL)
FSD, ELASTIC, EXACT = DivergenceRule(), ElasticRule(), ExactRule()


def case(p1: list[float], token: int, argmax: int) -> tuple[Proposal, TargetRow]:
    """Draft (½, ½) on tokens 0 and 1 against the target's p₁ on them."""
    proposal = Proposal(
        token, np.array([0, 1, 2], np.int32), np.array([0.5, 0.5, 0.0], np.float16), GREEDY
    )
    return proposal, TargetRow(argmax, np.array([*p1, 0.0]), np.empty(0), max(p1))


# p = (¼, ¾), q = (½, ½): m = (⅜, ⅝); KL(p‖m) = ¼ ln ⅔ + ¾ ln 6/5 = 0.035376,
# KL(q‖m) = ½ ln 4/3 + ½ ln 4/5 = 0.032269; half their sum:
NEAR = 0.0338227


def test_divergence_by_hand() -> None:
    by_hand = 0.5 * (
        0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
        + 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    )  # fmt: skip
    assert by_hand == pytest.approx(NEAR, abs=1e-6)
    assert divergence(*case([0.25, 0.75], 0, 1)) == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("token", [0, 1])
@pytest.mark.parametrize(("threshold", "stands"), [(NEAR + 1e-6, True), (NEAR - 1e-6, False)])
def test_fsd_looks_at_the_divergence_alone(token: int, threshold: float, stands: bool) -> None:
    assert FSD.accepts(*case([0.25, 0.75], token, 1), GREEDY, 3, threshold) is stands


@pytest.mark.parametrize(
    ("token", "threshold", "stands"),
    [
        (1, 0.0, True),  # the argmax: exact verification accepts it
        (1, -1.0, True),
        (0, NEAR + 1e-6, True),  # not the argmax, but alike
        (0, NEAR - 1e-6, False),
        (0, -1.0, False),
    ],
)
def test_e2sci_takes_what_is_exact_or_alike(token: int, threshold: float, stands: bool) -> None:
    assert ELASTIC.accepts(*case([0.25, 0.75], token, 1), GREEDY, 3, threshold) is stands


def test_equal_distributions_do_not_make_a_negative_threshold_lenient() -> None:
    proposal, row = case([0.5, 0.5], 1, 0)
    assert divergence(proposal, row) == 0.0
    assert ELASTIC.accepts(proposal, row, GREEDY, 3, 0.0)
    assert not ELASTIC.accepts(proposal, row, GREEDY, 3, -0.01)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31), position=st.integers(0, 500), threshold=st.floats(-1, -1e-9),
    sampling=st.sampled_from([
        GREEDY, SAMPLED, SamplingParams(1.0, 0.8, seed=2, coupling=RESIDUAL)
    ]),
)  # fmt: skip
def test_below_zero_e2sci_is_exact_verification(
    seed: int, position: int, threshold: float, sampling: SamplingParams
) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=12) * 2
    ids = generator.permutation(12)[:4].astype(np.int32)
    probs = np.sort(generator.dirichlet(np.ones(4)))[::-1].astype(np.float16)
    proposal = Proposal(int(ids[0]), ids, probs, sampling)
    p1 = warp_dense(logits, SamplingParams(1.0))
    row = TargetRow(
        int(logits.argmax()), p1[ids], warp_dense(logits, sampling)[ids], float(p1.max())
    )
    exactly = EXACT.accepts(proposal, row, sampling, position, threshold)
    assert ELASTIC.accepts(proposal, row, sampling, position, threshold) is exactly
    target = warp_dense(logits, SAMPLED)
    recovered = [r.recover(proposal, target, sampling, position) for r in (ELASTIC, EXACT)]
    assert recovered[0] == recovered[1]


def test_fsd_draws_from_the_targets_own_distribution() -> None:
    target = np.array([0.25, 0.25, 0.5])
    proposal, _ = case([0.25, 0.75], 0, 1)
    for position in range(50):
        u = uniform(SAMPLED.seed, position, Purpose.RESIDUAL)
        assert FSD.recover(proposal, target, SAMPLED, position) == draw_dense(target, u)


def test_both_are_lossy() -> None:
    assert not FSD.lossless
    assert not ELASTIC.lossless
