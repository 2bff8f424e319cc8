"""Bins of credit × thresholds: what windows took, gave and were worth; and the labels.

For each bin of r̂ and each threshold θ_j (PAPER.md §2)

    L(θ | r̂) = E[T_seg | r̂] + γ_E·E[E_cloud | r̂] − γ·E[L_acc | r̂]

is estimated from the windows that were tried there; the label is the θ with the least L among those
whose quality holds: committed tokens lie on average at most δ nats below the target's first choice
at their place, their regret [ours]. Regret compares tokens of the same text, so it takes far fewer
windows to tell thresholds apart than likelihoods of different texts. γ is the price of a token in
ms; by default what a token takes on average over all windows, so that L = 0 is the average. γ_E is
the price of a joule in ms, which weighs energy against latency; by default energy costs nothing.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from controller.calibration.records import WindowRecord
from decoding.predictor import MOST_WINDOW

NUM_BINS = 5
LEAST_WINDOWS = 8
"""A cell with fewer windows says nothing [ours]."""
LOSS_NATS = 0.05
"""δ: how far a token may lie below the target's first choice, on average [ours]."""


@dataclass(frozen=True, slots=True)
class Price:
    """What counts how much.

    Attributes:
        token_ms: γ, ms that a committed token is worth. joule_ms: γ_E, ms that a joule costs.
    """

    token_ms: float
    joule_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Cell:
    """Windows at one threshold in one bin of credit.

    Attributes:
        segment_ms: E[T_seg]. committed: E[L_acc], the token behind the accepted ones included.
        log_likelihood, regret: nats a token. agreement: share of tokens that are the target's own
            choice.
        energy_j: E[E_cloud].
        spread: standard errors of segment_ms, committed and regret, by the jackknife over samples,
            since windows of one answer are alike.
    """

    threshold: float
    num_windows: int
    segment_ms: float
    committed: float
    log_likelihood: float
    agreement: float
    regret: float
    energy_j: float
    spread: tuple[float, float, float]

    @classmethod
    def of(cls, threshold: float, records: Sequence[WindowRecord]) -> Cell:
        scored = max(sum(record.num_scored for record in records), 1)
        segment_ms, committed, regret = _means(records)
        return cls(
            threshold,
            len(records),
            segment_ms,
            committed,
            sum(record.log_likelihood for record in records) / scored,
            sum(record.num_greedy for record in records) / scored,
            regret,
            statistics.fmean(record.energy_j or 0.0 for record in records),
            _jackknife(records),
        )

    def cost(self, price: Price) -> float:
        """L(θ | r̂) in ms."""
        return self.segment_ms + price.joule_ms * self.energy_j - price.token_ms * self.committed


@dataclass(frozen=True, slots=True)
class Bin:
    """One bin of credit.

    Attributes:
        credit: mean r̂ of its windows.
        cells: by rising threshold; the first is exact verification.
        label: θ. window: W with the greatest goodput at the bin's acceptance.
    """

    credit: float
    cells: tuple[Cell, ...]
    label: float
    window: int


@dataclass(frozen=True, slots=True)
class Table:
    """A calibration's table.

    Attributes:
        edges: of the bins, between them.
        neutral: W → mean p_acc, τ(W).
        price: γ and γ_E.
    """

    edges: tuple[float, ...]
    bins: tuple[Bin, ...]
    neutral: dict[int, float]
    price: Price

    def bin_of(self, credit: float) -> Bin:
        return self.bins[bisect.bisect_right(self.edges, credit)]


def make_table(
    records: Sequence[WindowRecord],
    price: Price | None = None,
    loss_nats: float = LOSS_NATS,
    num_bins: int = NUM_BINS,
    edges: tuple[float, ...] | None = None,
) -> Table:
    """The table of these windows; bins of about equal size, or between `edges`.

    Raises:
        ValueError: no window lies in one of the bins between `edges`.
    """
    price = price or Price(mean_token_ms(records))
    if edges is None:
        edges = _quantiles([record.credit for record in records], num_bins)
    groups: dict[int, list[WindowRecord]] = defaultdict(list)
    for record in records:
        groups[bisect.bisect_right(edges, record.credit)].append(record)
    if len(groups) <= len(edges):
        raise ValueError("too few windows: none lies in one of the bins of credit")
    cells = [_cells(groups[index]) for index in range(len(edges) + 1)]
    bins = tuple(
        Bin(
            statistics.fmean(record.credit for record in groups[index]), own,
            _label(own, regrets, price, loss_nats), _best_window(groups[index]),
        )
        for index, (own, regrets) in enumerate(zip(cells, falling_regrets(cells), strict=True))
    )  # fmt: skip
    return Table(edges, bins, neutral_by_window(records), price)


def mean_token_ms(records: Sequence[WindowRecord]) -> float:
    """ms a committed token, over all windows."""
    return sum(r.segment_ms for r in records) / max(sum(r.num_committed for r in records), 1)


def neutral_by_window(records: Sequence[WindowRecord]) -> dict[int, float]:
    """τ(W): the mean p_acc of windows of W, where enough were tried."""
    groups: dict[int, list[float]] = defaultdict(list)
    for record in records:
        groups[record.num_drafted].append(record.acceptance)
    return {
        window: statistics.fmean(shares)
        for window, shares in sorted(groups.items())
        if len(shares) >= LEAST_WINDOWS
    }


def _means(records: Sequence[WindowRecord]) -> tuple[float, float, float]:
    """ms and committed tokens a window, regret a token."""
    scored = max(sum(record.num_scored for record in records), 1)
    return (
        statistics.fmean(record.segment_ms for record in records),
        statistics.fmean(record.num_committed for record in records),
        sum(record.regret for record in records) / scored,
    )


def _jackknife(records: Sequence[WindowRecord]) -> tuple[float, float, float]:
    """Standard errors of `_means`, a sample left out at a time; of one sample the means."""
    samples = {record.sample for record in records}
    if len(samples) < 2:
        return _means(records)
    without = np.array([_means([r for r in records if r.sample != s]) for s in samples])
    scale = (len(samples) - 1) * without.var(axis=0)
    segment_ms, committed, regret = np.sqrt(scale).tolist()
    return segment_ms, committed, regret


def differences(table: Table, other: Table) -> list[float]:
    """How far apart cells of two tables with the same edges lie, in standard errors of their
    difference: one number for each quantity of each cell that both have."""
    found = []
    for own, theirs in zip(table.bins, other.bins, strict=True):
        cells = {cell.threshold: cell for cell in theirs.cells}
        for cell in own.cells:
            match = cells.get(cell.threshold)
            if match is None:
                continue
            mine = (cell.segment_ms, cell.committed, cell.regret)
            values = (match.segment_ms, match.committed, match.regret)
            for a, b, *spreads in zip(mine, values, cell.spread, match.spread, strict=True):
                error = math.hypot(*spreads)
                found.append(abs(a - b) / error if error else 0.0)
    return found


def _cells(records: Sequence[WindowRecord]) -> tuple[Cell, ...]:
    """Of one bin, by rising threshold."""
    groups: dict[float, list[WindowRecord]] = defaultdict(list)
    for record in records:
        groups[record.threshold].append(record)
    return tuple(
        Cell.of(threshold, group)
        for threshold, group in sorted(groups.items())
        if len(group) >= LEAST_WINDOWS
    )


def _label(
    cells: Sequence[Cell], regrets: Mapping[float, float], price: Price, loss_nats: float
) -> float:
    """The θ with the least cost among those that keep quality; exact verification, −1, where
    nothing is known."""
    if not cells:
        return -1.0
    good = [cell for cell in cells if regrets[cell.threshold] <= loss_nats] or cells[:1]
    return min(good, key=lambda cell: cell.cost(price)).threshold


def _best_window(records: Sequence[WindowRecord]) -> int:
    """The W with the greatest goodput by the bin's own rate and times, drafting by the token.

    The rate a solves mean E[L_acc] = mean Σ_{i≤W} aⁱ.
    """
    wanted = statistics.fmean(record.expected_accepted for record in records)
    windows = [record.num_drafted for record in records]
    low, high = 0.0, 0.999
    for _ in range(40):
        a = (low + high) / 2
        if statistics.fmean(_expected(a, window) for window in windows) < wanted:
            low = a
        else:
            high = a
    step_ms = sum(r.draft_ms for r in records) / sum(windows)
    rest_ms = statistics.fmean(r.segment_ms - r.draft_ms for r in records)
    return max(
        range(1, MOST_WINDOW + 1),
        key=lambda window: (1.0 + _expected(low, window)) / (window * step_ms + rest_ms),
    )


def _expected(a: float, window: int) -> float:
    """Σ_{i≤W} aⁱ."""
    return a * (1.0 - a**window) / (1.0 - a)


def safe_thresholds(table: Table, loss_nats: float = LOSS_NATS) -> tuple[float, ...]:
    """For each bin the greatest threshold whose regret stays within δ, on the lines between those
    tried; 0 where only exact verification's does. It never falls with credit."""
    regrets = falling_regrets([b.cells for b in table.bins])
    return tuple(_safe(own, loss_nats) for own in regrets)


def falling_regrets(bins: Sequence[Sequence[Cell]]) -> list[dict[float, float]]:
    """Bin by bin, threshold → regret, made to fall as credit rises (isotonic regression) [ours].

    That the same threshold costs less where draft and target agree more is what credit rests on;
    single cells have too few windows to show it each for itself.
    """
    from scipy.optimize import isotonic_regression  # noqa: PLC0415 - no controller needs it

    regrets: list[dict[float, float]] = [{} for _ in bins]
    for threshold in sorted({cell.threshold for cells in bins for cell in cells}):
        found = [(i, cell) for i, cells in enumerate(bins) for cell in cells
                 if cell.threshold == threshold]  # fmt: skip
        falling = isotonic_regression(
            [cell.regret for _, cell in found],
            weights=[float(cell.num_windows) for _, cell in found],
            increasing=False,
        ).x
        for (index, _), regret in zip(found, falling, strict=True):
            regrets[index][threshold] = float(regret)
    return regrets


def _safe(regrets: Mapping[float, float], loss_nats: float) -> float:
    if not regrets:
        return 0.0
    grid = np.linspace(0.0, max(*regrets, 0.0), 301)
    tried = [max(threshold, 0.0) for threshold in regrets]
    losses = np.interp(grid, tried, list(regrets.values()))
    too_much = np.flatnonzero(losses > loss_nats)
    return float(grid[-1] if not too_much.size else grid[max(too_much[0] - 1, 0)])


def _quantiles(values: Sequence[float], num_bins: int) -> tuple[float, ...]:
    """Edges of bins of about equal size, none of them empty."""
    ranked = sorted(values)
    edges: list[float] = []
    for index in range(1, num_bins):
        cut = ranked[len(ranked) * index // num_bins]
        if cut > (edges[-1] if edges else ranked[0]):
            edges.append(cut)
    return tuple(edges)
