"""Bins of credit × thresholds: what windows took, gave and were worth; and the labels.

For each bin of r̂ and each threshold θ_j (docs/method.md, Calibration)

    L(θ | r̂) = E[T_seg | r̂] + γ_E·E[E_cloud | r̂] − γ·E[L_acc | r̂]

is estimated from the windows that were tried there; the label is the θ with the least L among those
whose quality holds: committed tokens lie on average at most δ nats below the target's first choice
at their place, their regret [ours]. Regret compares tokens of the same text, so it takes far fewer
windows to tell thresholds apart than likelihoods of different texts. γ is the price of a token in
ms; by default what a token takes on average over all windows, so that L = 0 is the average. γ_E is
the price of a joule in ms, which weighs energy against latency; by default energy costs nothing.
Both decide over the window W; a window takes the same time and energy at any θ (`curves`).
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import msgspec
import numpy as np

from decoding.predictor import MOST_WINDOW
from training.calibration.curves import Curve, smoothed
from training.calibration.records import WindowRecord

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
class ThresholdCell:
    """Windows at one threshold in one bin of credit.

    Attributes:
        segment_ms: E[T_seg]. committed: E[L_acc], the token after the accepted ones included.
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
    def of(cls, threshold: float, records: Sequence[WindowRecord]) -> ThresholdCell:
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

    @property
    def means(self) -> tuple[float, float, float]:
        """Those that `spread` goes with."""
        return self.segment_ms, self.committed, self.regret


@dataclass(frozen=True, slots=True)
class Bin:
    """One bin of credit.

    Attributes:
        credit: mean r̂ of its windows.
        cells: by rising threshold; the first is exact verification.
        label: θ. window: W with the greatest goodput at the bin's acceptance.
    """

    credit: float
    cells: tuple[ThresholdCell, ...]
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

    @property
    def curves(self) -> list[Curve]:
        """Of each bin."""
        return smoothed([b.cells for b in self.bins])

    def to_json(self) -> msgspec.Raw:
        """As a calibration's file keeps it."""
        return msgspec.Raw(msgspec.json.encode(self))

    @classmethod
    def from_json(cls, table: msgspec.Raw) -> Self:
        """What `to_json` wrote. Raises msgspec.ValidationError where it is no table."""
        return msgspec.json.decode(table, type=cls)

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
            curve.label(loss_nats), _best_window(groups[index], price),
        )
        for index, (own, curve) in enumerate(zip(cells, smoothed(cells), strict=True))
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


def differences(table: Table, other: Table) -> tuple[float, list[float]]:
    """How far two tables with the same edges lie apart.

    Returns the speed of the other's machine over this one's, and for each quantity of each cell
    that both have the difference in its standard errors. Times are compared at equal speed: what a
    machine gives changes from hour to hour, and is no property of the pair.
    """
    pairs = []
    for own, theirs in zip(table.bins, other.bins, strict=True):
        cells = {cell.threshold: cell for cell in theirs.cells}
        pairs += [(c, cells[c.threshold]) for c in own.cells if c.threshold in cells]
    if not pairs:
        return 1.0, []
    speed = sum(a.segment_ms for a, _ in pairs) / sum(b.segment_ms for _, b in pairs)
    found = []
    for cell, match in pairs:
        for a, b, scale, *spreads in zip(
            cell.means, match.means, (speed, 1.0, 1.0), cell.spread, match.spread, strict=True
        ):
            error = math.hypot(spreads[0], scale * spreads[1])
            found.append(abs(a - scale * b) / error if error else 0.0)
    return speed, found


def _cells(records: Sequence[WindowRecord]) -> tuple[ThresholdCell, ...]:
    """Of one bin, by rising threshold."""
    groups: dict[float, list[WindowRecord]] = defaultdict(list)
    for record in records:
        groups[record.threshold].append(record)
    return tuple(
        ThresholdCell.of(threshold, group)
        for threshold, group in sorted(groups.items())
        if len(group) >= LEAST_WINDOWS
    )


def _best_window(records: Sequence[WindowRecord], price: Price) -> int:
    """The W with the least T_seg + γ_E·E_cloud − γ·L_acc, at the bin's own rate and times.

    The rate a solves mean E[L_acc] = mean Σ_{i≤W} aⁱ; times and joules are linear in W.
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
    if price.joule_ms:
        step_ms += price.joule_ms * _slope(windows, [r.energy_j or 0.0 for r in records])
    return min(
        range(1, MOST_WINDOW + 1),
        key=lambda window: window * step_ms - price.token_ms * _expected(low, window),
    )


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the least-squares line; 0 where all `xs` are alike."""
    return statistics.linear_regression(xs, ys).slope if len(set(xs)) > 1 else 0.0


def _expected(a: float, window: int) -> float:
    """Σ_{i≤W} aⁱ."""
    return a * (1.0 - a**window) / (1.0 - a)


def safe_thresholds(table: Table, loss_nats: float = LOSS_NATS) -> tuple[float, ...]:
    """For each bin the greatest threshold whose regret stays within δ; it never falls with
    credit."""
    return tuple(curve.safe(loss_nats) for curve in table.curves)


def _quantiles(values: Sequence[float], num_bins: int) -> tuple[float, ...]:
    """Edges of bins of about equal size, none of them empty."""
    ranked = sorted(values)
    edges: list[float] = []
    for index in range(1, num_bins):
        cut = ranked[len(ranked) * index // num_bins]
        if cut > (edges[-1] if edges else ranked[0]):
            edges.append(cut)
    return tuple(edges)
