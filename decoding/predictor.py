"""g_θ(r̂, Δr̂) = (ω, W): five feed-forward layers, here without a training library.

Trained by `training.calibration`; asked after every window, so it is a few products of 16 × 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bus.protocol.arrays import Float64Array
from decoding.credit import Advice

NUM_LAYERS = 5
WIDTH = 16
"""Of the hidden layers [ours]."""
LEAST_OMEGA, MOST_OMEGA = 0.05, 4.0
"""Bounds of ω [ours]: they bound how fast the threshold follows credit (`decoding.credit`)."""
MOST_WINDOW = 32
SCALE = 4.0
"""Credit moves by a few tenths; the network is given it in quarters [ours]."""

Layers = tuple[tuple[Float64Array, Float64Array], ...]
"""(weight float64[out, in], bias float64[out]) of each layer, the first of 2 inputs, the last of 2
outputs."""


@dataclass(frozen=True, eq=False)
class NeuralPredictor:
    """The trained network.

    Attributes:
        layers: `NUM_LAYERS` of them, ReLU between.
        neutral: τ of the reference window, subtracted from r̂.
    """

    layers: Layers
    neutral: float

    def __call__(self, credit: float, credit_delta: float) -> Advice:
        x: Float64Array = SCALE * np.array([credit - self.neutral, credit_delta])
        *hidden, (weight, bias) = self.layers
        for inner, shift in hidden:
            x = np.maximum(inner @ x + shift, 0.0)
        omega, window = (float(value) for value in weight @ x + bias)
        return Advice(
            omega=min(max(softplus(omega), LEAST_OMEGA), MOST_OMEGA),
            window=round(min(max(1.0 + softplus(window), 1.0), MOST_WINDOW)),
        )


def softplus(value: float) -> float:
    """ln(1 + eˣ), for large x too."""
    return float(np.logaddexp(0.0, value))
