"""Is credit inert: are windows like those before them (docs/method.md, Credit)?

Autocorrelation of the acceptance of windows within an answer, pooled over answers, at lags 1 … 10;
and the mean acceptance of windows whose last k had a mean above 0.8, or below 0.4. Intervals by
bootstrap over answers, since windows of one answer are no independent draws. Answers differ in how
easy they are, which alone makes their windows alike; how much is told by the same figure after the
windows of each answer have been shuffled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

from bench.ranges import Interval

LAGS = tuple(range(1, 11))
HIGH, LOW = 0.8, 0.4
"""Bounds of a history that is good, or bad (docs/method.md, Credit)."""
MEMORY = 5
PAPER_HIGH, PAPER_LOW = 0.85, 0.32
RESAMPLES = 1000
SHUFFLES = 20

Series = Sequence[float]


@dataclass(frozen=True, slots=True)
class Inertia:
    """What a set of answers shows.

    Attributes:
        autocorrelation: at `LAGS`. shuffled: what it would be at any lag if only answers differed
            and order meant nothing.
        after_high, after_low: mean acceptance of windows after such a history.
        spread_high, spread_low: standard deviation of the acceptance of these windows.
        num_high, num_low, num_windows: how many.
    """

    autocorrelation: tuple[Interval, ...]
    shuffled: float
    after_high: Interval
    after_low: Interval
    spread_high: float
    spread_low: float
    num_high: int
    num_low: int
    num_windows: int
    mean: float


def inertia(answers: Sequence[Series]) -> Inertia:
    """Of the acceptance of windows, answer by answer, in order."""
    kept = [np.asarray(answer, float) for answer in answers if len(answer) > 1]
    windows = np.concatenate(kept) if kept else np.array([])
    high, low = _behind(kept, lambda mean: mean > HIGH), _behind(kept, lambda mean: mean < LOW)
    return Inertia(
        tuple(_estimate(kept, partial(_correlation, lag=lag)) for lag in LAGS),
        _shuffled(kept),
        _estimate(kept, lambda part: _mean(_behind(part, lambda mean: mean > HIGH))),
        _estimate(kept, lambda part: _mean(_behind(part, lambda mean: mean < LOW))),
        _deviation(high), _deviation(low), high.size, low.size, windows.size, _mean(windows),
    )  # fmt: skip


def _correlation(answers: Sequence[Any], lag: int) -> float:
    """Pearson's r of acceptance and acceptance `lag` windows later."""
    early = [answer[:-lag] for answer in answers if len(answer) > lag]
    late = [answer[lag:] for answer in answers if len(answer) > lag]
    if not early:
        return float("nan")
    x, y = np.concatenate(early), np.concatenate(late)
    if x.size < 3 or x.std() == 0.0 or y.std() == 0.0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _shuffled(answers: Sequence[Any]) -> float:
    rng = np.random.default_rng(0)
    values = [_correlation([rng.permutation(a) for a in answers], 1) for _ in range(SHUFFLES)]
    return float(np.mean(values))


def _behind(answers: Sequence[Any], is_such: Callable[[float], bool]) -> np.ndarray[Any, Any]:
    """Acceptance of windows whose last `MEMORY` have such a mean."""
    found = [
        answer[at]
        for answer in answers
        for at in range(MEMORY, len(answer))
        if is_such(float(answer[at - MEMORY : at].mean()))
    ]
    return np.asarray(found, float)


def _mean(values: Any) -> float:
    return float(values.mean()) if values.size else float("nan")


def _deviation(values: Any) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else float("nan")


def _estimate(answers: Sequence[Any], statistic: Callable[[Sequence[Any]], float]) -> Interval:
    value = statistic(answers)
    if len(answers) < 2 or np.isnan(value):
        return Interval(value, float("nan"), float("nan"))

    def resampled(indices: Any) -> float:
        return statistic([answers[int(index)] for index in indices])

    with warnings.catch_warnings():
        # Some resamples hold no such window at all: those are left out below.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            (np.arange(len(answers)),), resampled, vectorized=False, n_resamples=RESAMPLES,
            method="percentile", rng=np.random.default_rng(0),
        )  # fmt: skip
    low, high = np.nanpercentile(found.bootstrap_distribution, [2.5, 97.5])
    return Interval(value, float(low), float(high))
