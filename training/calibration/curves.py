"""What a threshold gives and costs at each credit: the table's cells, smoothed.

Two things are taken for granted [ours], because single cells have too few windows to show them
each for itself (isotonic regression, over credit and thresholds in turns):

- a more lenient threshold commits no fewer tokens and costs no less quality;
- the same threshold commits no fewer tokens, and costs no more quality, at higher credit. That is
  what credit rests on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import isotonic_regression

from bus.protocol.arrays import Float64Array

if TYPE_CHECKING:
    from training.calibration.table import ThresholdCell

_ROUNDS = 50


@dataclass(frozen=True, slots=True)
class Curve:
    """One bin of credit.

    Attributes:
        thresholds: those tried, rising; nats, below 0 is exact verification.
        committed: tokens a window, at each. regret: nats a token.
    """

    thresholds: tuple[float, ...] = ()
    committed: tuple[float, ...] = ()
    regret: tuple[float, ...] = ()

    def label(self, loss_nats: float) -> float:
        """The threshold that commits most among those that keep quality, the strictest of several;
        exact verification where nothing is known.

        It is the θ with the least L(θ | r̂): a window is drafted, sent and verified before its
        feedback, so that of L only E[L_acc] depends on θ.
        """
        good = [
            (-committed, threshold)
            for threshold, committed, regret in zip(
                self.thresholds, self.committed, self.regret, strict=True
            )
            if regret <= loss_nats
        ]
        return min(good)[1] if good else -1.0

    def safe(self, loss_nats: float) -> float:
        """The greatest threshold whose regret stays within δ, on the lines between those tried; 0
        where only exact verification's does."""
        if not self.thresholds:
            return 0.0
        tried = [max(threshold, 0.0) for threshold in self.thresholds]
        grid = np.linspace(0.0, tried[-1], 301)
        too_much = np.flatnonzero(np.interp(grid, tried, self.regret) > loss_nats)
        return float(grid[-1] if not too_much.size else grid[max(too_much[0] - 1, 0)])


def smoothed(bins: Sequence[Sequence[ThresholdCell]]) -> list[Curve]:
    """A curve for each bin, by rising credit."""
    thresholds = sorted({cell.threshold for cells in bins for cell in cells})
    known = [{cell.threshold: cell for cell in cells} for cells in bins]

    def grid(value: Callable[[ThresholdCell], float]) -> Float64Array:
        return np.array([[value(cells[t]) if t in cells else 0.0 for t in thresholds]
                         for cells in known])  # fmt: skip

    weights = grid(lambda cell: cell.num_windows)
    committed = _monotone(grid(lambda cell: cell.committed), weights, rises_with_credit=True)
    regret = _monotone(grid(lambda cell: cell.regret), weights, rises_with_credit=False)
    curves = []
    for cells, own_committed, own_regret in zip(known, committed, regret, strict=True):
        kept = [i for i, threshold in enumerate(thresholds) if threshold in cells]
        curves.append(
            Curve(
                tuple(thresholds[i] for i in kept),
                tuple(float(own_committed[i]) for i in kept),
                tuple(float(own_regret[i]) for i in kept),
            )
        )
    return curves


def _monotone(values: Float64Array, weights: Float64Array, rises_with_credit: bool) -> Float64Array:
    """The nearest values (weighted squares) that rise with the threshold and rise or fall with
    credit, by Dykstra's projections; float64[bins, thresholds]. Weight 0 is no value."""

    def along(table: Float64Array, axis: int, increasing: bool) -> Float64Array:
        fitted = table.copy()
        for index in range(table.shape[1 - axis]):
            line = (slice(None), index) if axis == 0 else (index, slice(None))
            there = weights[line] > 0.0
            if there.any():
                fitted[line][there] = isotonic_regression(
                    table[line][there], weights=weights[line][there], increasing=increasing
                ).x
        return fitted

    found, by_credit, by_threshold = values, np.zeros_like(values), np.zeros_like(values)
    for _ in range(_ROUNDS):
        wanted = found + by_credit
        found = along(wanted, 0, rises_with_credit)
        by_credit = wanted - found
        wanted = found + by_threshold
        found = along(wanted, 1, increasing=True)
        by_threshold = wanted - found
    return found


def gains_of_following(curves: Sequence[Curve], weights: Sequence[float]) -> dict[float, float]:
    """For each threshold tried: the tokens that one threshold a bin can commit at the same mean
    regret ÷ those that this one commits everywhere.

    The best that following credit can bring on these windows, known in hindsight.

    Args:
        weights: windows of each bin.
    """
    known = [(c, w) for c, w in zip(curves, weights, strict=True) if c.thresholds]
    if not known:
        return {}
    shared = sorted(set.intersection(*(set(curve.thresholds) for curve, _ in known)))
    at = [[curve.thresholds.index(t) for t in shared] for curve, _ in known]
    committed = np.array(
        [[w * c.committed[i] for i in own] for (c, w), own in zip(known, at, strict=True)]
    )
    lost = committed * np.array(
        [[c.regret[i] for i in own] for (c, _), own in zip(known, at, strict=True)]
    )
    rows = np.arange(len(known))
    choices = np.array(list(itertools.product(range(len(shared)), repeat=len(known))))
    tokens = committed[rows, choices].sum(axis=1)
    regrets = lost[rows, choices].sum(axis=1) / tokens
    gains = {}
    for index, threshold in enumerate(shared):
        fixed = committed[:, index].sum()
        allowed = regrets <= lost[:, index].sum() / fixed + 1e-12
        gains[threshold] = float(tokens[allowed].max() / fixed)
    return gains
