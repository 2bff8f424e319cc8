"""The predictor's network: by hand, and within its bounds whatever its weights."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from decoding.predictor import (
    LEAST_OMEGA,
    MOST_OMEGA,
    MOST_WINDOW,
    NUM_LAYERS,
    WIDTH,
    Layers,
    NeuralPredictor,
    softplus,
)


def layers(seed: int, scale: float) -> Layers:
    generator = np.random.default_rng(seed)
    sizes = [2, *[WIDTH] * (NUM_LAYERS - 1), 2]
    return tuple(
        (scale * generator.normal(size=(out, inner)), scale * generator.normal(size=out))
        for inner, out in itertools.pairwise(sizes)
    )


def test_one_hidden_unit_by_hand() -> None:
    """x = 4·(0.7 − 0.6, 0.05) = (0.4, 0.2); h = relu(0.4 − 0.2 + 0.1) = 0.3; out = (0.3, 1.9)."""
    network = (
        (np.array([[1.0, -1.0]]), np.array([0.1])),
        (np.array([[1.0], [3.0]]), np.array([0.0, 1.0])),
    )
    advice = NeuralPredictor(network, neutral=0.6)(0.7, 0.05)
    assert advice.omega == pytest.approx(math.log1p(math.exp(0.3)))
    assert advice.window == round(1 + math.log1p(math.exp(1.9)))  # 1 + 2.04


def test_softplus_does_not_overflow() -> None:
    assert softplus(1e4) == 1e4
    assert softplus(-1e4) == 0.0


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 100.0])
def test_advice_stays_within_bounds(scale: float) -> None:
    for seed in range(5):
        predictor = NeuralPredictor(layers(seed, scale), neutral=0.6)
        for credit in np.linspace(0, 1, 7):
            for delta in (-1.0, -0.1, 0.0, 0.3, 1.0):
                advice = predictor(float(credit), delta)
                assert LEAST_OMEGA <= advice.omega <= MOST_OMEGA
                assert 1 <= advice.window <= MOST_WINDOW
