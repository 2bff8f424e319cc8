"""What was read, kept small: counts per second, edge and method, and their binning into frames.

Fifty sessions make hundreds of telemetry entries a second; the page needs sums. `Traffic` folds
entries in as they come, so that memory and the cost of a refresh follow the time shown, not the
number of windows. Knows no Redis, no clock and no charts; times are seconds since the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import pandas as pd

TOTALLED = ("windows", "drafted", "accepted", "committed", "rollbacks")
COUNTS = (*TOTALLED, "in_flight", "credited", "credit", "lossy", "threshold")
"""Summed columns of a traffic frame: `credited` counts windows of methods that follow credit, and
`credit` sums theirs; `lossy` counts windows whose threshold says something, and `threshold` sums
theirs, in nats."""

TRAFFIC_COLUMNS = ("at_s", "edge", "method", *COUNTS)

BIN_S = {60: 2, 300: 5, 900: 15, 3600: 60}
"""Seconds shown → seconds per point: about sixty points, no bin so short that it is noise."""


@dataclass(frozen=True, slots=True)
class Span:
    """The half-open time range [start_s, end_s) in bins of `bin_s` seconds, aligned to them."""

    start_s: int
    end_s: int
    bin_s: int

    @classmethod
    def ending_at(cls, now_s: float, length_s: int) -> Self:
        """The last `length_s` seconds in whole bins; the unfinished bin is left out.

        A bin that is still filling would show as a drop at the right edge of every chart.
        """
        bin_s = BIN_S[length_s]
        end_s = int(now_s) // bin_s * bin_s
        return cls(end_s - length_s, end_s, bin_s)

    def clipped(self, since_s: float) -> Self:
        """Without the bins that begin before `since_s`, the start of the record."""
        first = -int(-since_s // self.bin_s) * self.bin_s
        return type(self)(min(max(self.start_s, first), self.end_s), self.end_s, self.bin_s)


class Traffic:
    """Counts per (second, edge, method). Mutable; whoever shares it holds a lock."""

    def __init__(self) -> None:
        self._seconds: dict[int, dict[tuple[str, str], list[float]]] = {}

    def add(
        self,
        at_s: int,
        edge: str,
        method: str,
        *,
        drafted: int,
        accepted: int,
        committed: int,
        rollback: bool,
        in_flight: int = 0,
        credit: float | None = None,
        threshold: float | None = None,
    ) -> None:
        """Count one window; `credit` and `threshold` are None for a method without."""
        groups = self._seconds.setdefault(at_s, {})
        counts = groups.setdefault((edge, method), [0] * len(COUNTS))
        numbers = (
            1, drafted, accepted, committed, int(rollback), in_flight,
            int(credit is not None), credit or 0.0, int(threshold is not None), threshold or 0.0,
        )  # fmt: skip
        for index, number in enumerate(numbers):
            counts[index] += number

    def forget_before(self, at_s: int) -> None:
        """Drop whole seconds older than `at_s`."""
        for second in [second for second in self._seconds if second < at_s]:
            del self._seconds[second]

    def frame(self, start_s: int, end_s: int) -> pd.DataFrame:
        """Columns `TRAFFIC_COLUMNS`, one row per (second, edge, method) in [start_s, end_s)."""
        rows = [
            (second, edge, method, *counts)
            for second, groups in self._seconds.items()
            if start_s <= second < end_s
            for (edge, method), counts in groups.items()
        ]
        return pd.DataFrame(rows, columns=list(TRAFFIC_COLUMNS))


def binned(traffic: pd.DataFrame, span: Span, by: str | None = None) -> pd.DataFrame:
    """Sum `traffic` into the bins of `span`, per value of column `by` (`edge` or `method`).

    Returns:
        Columns `at` (UTC, start of the bin), `by` where given, and `COUNTS`. Every group has every
        bin, zeros included: silence is data. No rows where there is no traffic at all.
    """
    inside = traffic[(traffic["at_s"] >= span.start_s) & (traffic["at_s"] < span.end_s)]
    keys = ["bin_s"] if by is None else ["bin_s", by]
    sums = (
        inside.assign(bin_s=inside["at_s"] // span.bin_s * span.bin_s)
        .groupby(keys, sort=True)[list(COUNTS)]
        .sum()
    )
    if not sums.empty:
        bins = pd.Index(range(span.start_s, span.end_s, span.bin_s), name="bin_s")
        index: pd.Index[int] | pd.MultiIndex = bins
        if by is not None:
            index = pd.MultiIndex.from_product([bins, sums.index.unique(by)], names=keys)
        sums = sums.reindex(index, fill_value=0)
    table = sums.reset_index()
    table.insert(0, "at", pd.to_datetime(table.pop("bin_s").astype("int64"), unit="s", utc=True))
    return table


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a stretch of `seconds`, and the rates the tiles show."""

    windows: int
    drafted: int
    accepted: int
    committed: int
    rollbacks: int
    seconds: float

    @classmethod
    def of(cls, traffic: pd.DataFrame, start_s: int, end_s: int) -> Self:
        """Sum the rows in [start_s, end_s)."""
        inside = traffic[(traffic["at_s"] >= start_s) & (traffic["at_s"] < end_s)]
        sums = {name: int(inside[name].sum()) for name in TOTALLED}
        return cls(**sums, seconds=max(0, end_s - start_s))

    @property
    def goodput(self) -> float | None:
        """Committed tokens per second; None over no time."""
        return self.committed / self.seconds if self.seconds else None

    @property
    def acceptance(self) -> float | None:
        """Accepted ÷ drafted, 0 … 1; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def rollbacks_per_min(self) -> float | None:
        """Rollbacks per minute; None over no time."""
        return 60 * self.rollbacks / self.seconds if self.seconds else None

    @property
    def rollback_share(self) -> float | None:
        """Windows that ended in a rollback, 0 … 1; None where there were none."""
        return self.rollbacks / self.windows if self.windows else None
