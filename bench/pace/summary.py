"""What a run shows: medians over repetitions with their spread, ratios, and the ceiling."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from bench.pace.rows import ALONE, PaceRow, StackRow, tokens_per_s, whole_tokens_per_s
from bench.paced import AS_IT_IS
from bench.ranges import with_range


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest over repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        kept = sorted(values)
        return cls(statistics.median(kept), kept[0], kept[-1])

    def __str__(self) -> str:
        return with_range(self.median, self.low, self.high)


@dataclass(frozen=True, slots=True)
class PaceCell:
    """One method with one draft over one link, measured.

    Attributes:
        speed: tokens a second of a repetition: all its tokens ÷ all its seconds.
        over_sd, over_alone: the same repetition's speed ÷ that of `sd`'s best window, and ÷ the
            target's alone.
        whole_over_sd: as `over_sd`, of speeds over whole answers, the prompt's time included;
            median.
        ceiling: N tokens per N·c + RTT + t(1), N = 1/error rate; None without a set error rate.
        edge_idle: share of the time in which the draft did not draft. wasted: share of the
            drafted tokens that were thrown away. acceptance: accepted ÷ drafted and judged.
    """

    draft: str
    error_rate: float | None
    rtt_ms: float
    method: str
    speed: Spread
    over_sd: Spread
    whole_over_sd: float
    over_alone: float
    ceiling: float | None
    edge_idle: float
    wasted: float
    acceptance: float
    source: str = "measured"

    @property
    def name(self) -> str:
        """Of the draft: the last part of its spec, or how often the oracle is wrong."""
        if self.error_rate is None:
            return self.draft.rstrip("/").rpartition("/")[2]
        return f"oracle {self.error_rate:.0%}"

    @property
    def of_ceiling(self) -> float | None:
        return None if self.ceiling is None else self.speed.median / self.ceiling


def summarise(rows: Sequence[PaceRow], stacks: Sequence[StackRow]) -> list[PaceCell]:
    """One cell for each draft, link and method; the sweep is left out."""
    measured = [row for row in rows if not row.in_sweep]
    alone = tokens_per_s([row for row in measured if row.method == ALONE])
    drafted = [row for row in measured if row.method != ALONE]
    settings = list(dict.fromkeys((row.draft, row.error_rate, row.rtt_ms) for row in drafted))
    steps = {(stack.draft, stack.error_rate, stack.rtt_ms): stack.step_ms for stack in stacks}
    cells = []
    for setting in settings:
        draft, error_rate, rtt_ms = setting
        here = [row for row in measured if (row.draft, row.error_rate, row.rtt_ms) == setting]
        methods = {row.method: row for row in here if row.method != ALONE}
        reference = [row for row in here if row.method.startswith("sd:")]
        sd, sd_whole = _by_repeat(reference), _by_repeat(reference, whole_tokens_per_s)
        beside = [row for row in here if row.method == ALONE]
        ceiling = _ceiling(error_rate, steps[setting], rtt_ms, alone)
        for method in sorted(methods, reverse=True):
            own = [row for row in here if row.method == method]
            speeds = _by_repeat(own)
            speed = Spread.of(speeds.values())
            over_sd = Spread.of(speeds[repeat] / sd[repeat] for repeat in speeds)
            whole = _by_repeat(own, whole_tokens_per_s)
            whole_over_sd = statistics.median(whole[repeat] / sd_whole[repeat] for repeat in whole)
            over_alone = speed.median / (tokens_per_s(beside) if beside else alone)
            cells.append(
                PaceCell(
                    draft, error_rate, rtt_ms, method, speed, over_sd, whole_over_sd, over_alone,
                    ceiling, *_shares(own),
                )
            )  # fmt: skip
    return cells


def _by_repeat(
    rows: Sequence[PaceRow], speed: Callable[[Sequence[PaceRow]], float] = tokens_per_s
) -> dict[int, float]:
    """Repetition → tokens a second."""
    groups: dict[int, list[PaceRow]] = defaultdict(list)
    for row in rows:
        groups[row.repeat].append(row)
    return {repeat: speed(group) for repeat, group in groups.items()}


def _ceiling(error_rate: float | None, step_ms: float, rtt_ms: float, alone: float) -> float | None:
    if not error_rate:
        return None
    tokens = 1 / error_rate
    return 1e3 * tokens / (tokens * step_ms + rtt_ms + 1e3 / alone)


def _shares(rows: Sequence[PaceRow]) -> tuple[float, float, float]:
    """Edge idle, wasted, acceptance, over all answers."""
    usages = [row.usage for row in rows if row.usage is not None]
    idle = statistics.fmean(usage.edge_idle for usage in usages)
    wasted = sum(usage.wasted_tokens for usage in usages)
    accepted = sum(usage.accepted_tokens for usage in usages)
    drafted = sum(usage.drafted_tokens for usage in usages)
    return idle, wasted / max(wasted + accepted, 1), accepted / max(drafted, 1)


def as_table(cells: Sequence[PaceCell], device: str = AS_IT_IS) -> Table:
    """For people."""
    source = "measured" if device == AS_IT_IS else f"measured, {device}"
    table = Table(
        title="Tokens a second from the first pass's feedback to the last "
        f"({source}): median, range",
        caption="RTT: round trip in ms. whole: ÷ best sd with the prompt's time. ceiling: of the "
        "best that one chain can do. idle: share of the time in which the edge does not draft. in "
        "vain: drafted tokens thrown away",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    columns: dict[str, Callable[[PaceCell], str]] = {
        "draft": lambda c: c.name,
        "RTT": lambda c: f"{c.rtt_ms:g}",
        "method": lambda c: c.method,
        "tokens/s": lambda c: str(c.speed),
        "÷ alone": lambda c: f"{c.over_alone:.2f}",
        "÷ best sd": lambda c: str(c.over_sd),
        "whole": lambda c: f"{c.whole_over_sd:.2f}",
        "ceiling": lambda c: "–" if c.of_ceiling is None else f"{c.of_ceiling:.0%}",
        "idle": lambda c: f"{c.edge_idle:.0%}",
        "wasted": lambda c: f"{c.wasted:.0%}",
    }
    for name in columns:
        left = name in ("draft", "method")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for cell in cells:
        table.add_row(*(show(cell) for show in columns.values()))
    return table
