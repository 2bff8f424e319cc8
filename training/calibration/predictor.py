"""Training of the predictor: first on the table's labels, then on the paper's objective.

    labels      mean (T(r̂, Δr̂) − θ*)² and mean (ln W − ln W*)²
    objective   min_θ E[T_seg − λ·L_acc] (docs/method.md, Calibration) in units of λ = γ, with
                missing quality added; T_seg is the same for all θ (`curves`)

L_acc and quality of a threshold between two that were tried lie on the line between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bus.protocol.arrays import Float64Array
from decoding.credit import CreditLaw
from decoding.predictor import LEAST_OMEGA, MOST_OMEGA, NUM_LAYERS, SCALE, WIDTH, Layers
from training.calibration.curves import Curve
from training.calibration.records import WindowRecord
from training.calibration.table import LOSS_NATS, Table

LABEL_STEPS, OBJECTIVE_STEPS = 600, 300
LEARNING_RATE = 0.01
SHORTFALL_WEIGHT = 20.0
"""How many times the cost of an average window a nat of lost quality counts [ours]."""
Tick = Callable[[], None]


def train(
    table: Table, records: Sequence[WindowRecord], law: CreditLaw, tick: Tick, seed: int = 0
) -> Layers:
    """The network for this table.

    Args:
        law: its T_base, bounds, α_s and τ, which the network's ω goes with.
        tick: called after each of `LABEL_STEPS + OBJECTIVE_STEPS` steps.
    """
    torch.manual_seed(seed)
    network = _network()
    data = _Data(table, records, law)
    for steps, loss in ((LABEL_STEPS, data.label_loss), (OBJECTIVE_STEPS, data.objective)):
        optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(network(data.inputs)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            tick()
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    return tuple(
        (layer.weight.detach().double().numpy().copy(), layer.bias.detach().double().numpy().copy())
        for layer in linears
    )


def _network() -> nn.Sequential:
    sizes = [2, *[WIDTH] * (NUM_LAYERS - 1), 2]
    layers: list[nn.Module] = []
    for inner, out in itertools.pairwise(sizes):
        layers += [nn.Linear(inner, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class _Data:
    """The windows of a calibration as tensors."""

    def __init__(self, table: Table, records: Sequence[WindowRecord], law: CreditLaw) -> None:
        neutral = law.neutral(4)
        bins = [table.bin_of(record.credit) for record in records]
        excess = [record.credit - neutral for record in records]
        delta = [record.credit_delta for record in records]
        self._law = law
        self._excess = torch.tensor(excess)
        self.inputs = SCALE * torch.tensor([excess, delta]).T
        self._labels = torch.tensor([max(b.label, law.least) for b in bins])
        self._log_windows = torch.tensor([float(b.window) for b in bins]).log()
        self._which = torch.tensor([table.bins.index(b) for b in bins])
        grid = np.linspace(law.least, law.most, 57)
        self._grid = torch.tensor(grid, dtype=torch.float32)
        self._costs = torch.tensor(
            np.array([_costs(curve, grid) for curve in table.curves]), dtype=torch.float32
        )

    def thresholds(self, outputs: Tensor) -> Tensor:
        omega = nn.functional.softplus(outputs[:, 0]).clamp(LEAST_OMEGA, MOST_OMEGA)
        wanted = self._law.base + self._law.gain * omega * self._excess
        return wanted.clamp(self._law.least, self._law.most)

    def label_loss(self, outputs: Tensor) -> Tensor:
        misses = (self.thresholds(outputs) - self._labels).square().mean()
        return 100.0 * misses + self._window_loss(outputs)

    def objective(self, outputs: Tensor) -> Tensor:
        """Costs are in average tokens."""
        step = self._grid[1] - self._grid[0]
        at = ((self.thresholds(outputs) - self._grid[0]) / step).clamp(0, len(self._grid) - 1.001)
        low = at.detach().floor().long()
        costs = self._costs[self._which]
        left = costs.gather(1, low[:, None])[:, 0]
        right = costs.gather(1, low[:, None] + 1)[:, 0]
        return (left + (right - left) * (at - low)).mean() + self._window_loss(outputs)

    def _window_loss(self, outputs: Tensor) -> Tensor:
        windows = 1.0 + nn.functional.softplus(outputs[:, 1])
        return (windows.log() - self._log_windows).square().mean()


def _costs(curve: Curve, grid: Float64Array) -> Float64Array:
    """At each threshold of the grid: committed tokens a window, negative, and shortfall of
    quality."""
    if not curve.thresholds:
        return np.asarray(grid * 1.0)  # nothing is known: the less the better
    tried = [max(threshold, 0.0) for threshold in curve.thresholds]
    losses = np.interp(grid, tried, curve.regret)
    shortfall = SHORTFALL_WEIGHT * np.maximum(losses - LOSS_NATS, 0.0)
    return np.asarray(shortfall - np.interp(grid, tried, curve.committed))
