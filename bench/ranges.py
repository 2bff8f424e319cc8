"""A value and the range around it, as people read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2000


def with_range(value: float, low: float, high: float) -> str:
    """`12.3 (11.9–12.8)`, below 10 with two decimals."""
    digits = 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


class Interval(msgspec.Struct, frozen=True):
    """A value and its 95 % interval; NaN where there is nothing to go by."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return with_range(self.value, self.low, self.high)


def paired_interval(sample: tuple[Any, ...], statistic: Callable[..., Any]) -> Interval:
    """A statistic of several arrays whose entries belong together, float64[n] each, and its 95 %
    interval by paired bootstrap (`scipy.stats.bootstrap`, percentiles); of fewer than two entries
    the value itself.

    Args:
        statistic: of the arrays, vectorised: takes `axis`.
    """
    value = float(statistic(*sample))
    if sample[0].size < 2:
        return Interval(value, value, value)
    low, high = bootstrap(
        sample, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Interval(value, float(low), float(high))
