"""A line for each method, data set and setting; intervals by paired bootstrap over prompts.

Speeds are ratios of sums: all tokens of the prompts ÷ all their seconds. A ratio of two methods is
that of their speeds on the same prompts. Intervals hold 95 % of 2,000 resamples of prompts
(`scipy.stats.bootstrap`, percentiles).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from rich import box
from rich.table import Table
from scipy.stats import bootstrap

from bench.evaluation.plan import TARGET
from bench.evaluation.rows import Row
from bench.paced import AS_IT_IS
from bench.ranges import Interval
from dashboard.evidence import ALL, family

RESAMPLES = 2000
_SEED = 0
_SD = "sd"


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One method on one data set in one setting.

    Attributes:
        dataset: its name, or `all`.
        ran: as it ran, with its window. prompts: how many.
        speed: tokens a second of decoding. end_to_end: of whole answers. goodput: of all prompts
            of a batch together.
        over_target, over_sd: speed ÷ that of the target alone, and of `sd` with its best window;
            None where that was not measured.
        first_token_ms, gap_p50_ms, gap_p95_ms: medians over prompts.
        acceptance: accepted ÷ judged. wasted: thrown away ÷ drafted. rollbacks, prehits: for each
            100 tokens. bytes_up, bytes_down: for each token of the answer.
        edge_busy, cloud_busy: shares of the time.
        mj_per_token: millijoules, edge and cloud, over the whole answer.
        nats_per_token, agreement, regret: quality under the target, means over tokens.
        accuracy: share of right answers; None where none can be marked.
    """

    method: str
    ran: str
    dataset: str
    rtt_ms: float
    draft: str
    variant: str
    clients: int
    device: str
    source: str
    prompts: int
    tokens: int
    speed: Interval
    end_to_end: Interval
    goodput: float
    over_target: Interval | None
    over_sd: Interval | None
    first_token_ms: float
    gap_p50_ms: float
    gap_p95_ms: float
    acceptance: float | None
    wasted: float | None
    rollbacks: float | None
    prehits: float | None
    bytes_up: float | None
    bytes_down: float | None
    edge_busy: float | None
    cloud_busy: float | None
    mj_per_token: float
    energy_source: str
    nats_per_token: float
    nats_below_target: float | None
    agreement: float
    regret: float
    accuracy: float | None


Where = tuple[float, str, str, int, str]
Rows = dict[tuple[str, int], Row]
"""(data set, prompt) → row."""


def summarise(rows: Sequence[Row]) -> list[Line]:
    """Lines in the order in which methods were asked for, all data sets together first."""
    settings: dict[Where, dict[str, Rows]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        where = (row.rtt_ms, row.draft, row.variant, row.clients, row.device)
        settings[where][row.method][row.dataset, row.prompt_id] = row
    lines = []
    for methods in settings.values():
        datasets = list(dict.fromkeys(name for own in methods.values() for name, _ in own))
        for dataset in ([ALL] if len(datasets) > 1 else []) + datasets:
            chosen = {method: _of(own, dataset) for method, own in methods.items()}
            lines += [_line(method, own, chosen, dataset) for method, own in chosen.items() if own]
    return lines


def _of(rows: Rows, dataset: str) -> Rows:
    return {key: row for key, row in rows.items() if dataset in (ALL, key[0])}


def _line(method: str, own: Rows, chosen: dict[str, Rows], dataset: str) -> Line:
    rows = list(own.values())
    first = rows[0]
    tokens = sum(row.tokens for row in rows)
    marks = [row.right for row in rows if row.right is not None]
    target = chosen.get(TARGET, {})
    nats = _mean(rows, lambda row: row.nats_per_token)
    shared = [key for key in own if key in target]
    below = None
    if shared:
        below = _mean([target[k] for k in shared], lambda row: row.nats_per_token) - _mean(
            [own[k] for k in shared], lambda row: row.nats_per_token
        )
    return Line(
        method=method, ran=first.ran, dataset=dataset, rtt_ms=first.rtt_ms, draft=first.draft,
        variant=first.variant, clients=first.clients, device=first.device, source=first.source,
        prompts=len(rows), tokens=tokens,
        speed=_interval(_speed_of(rows)), end_to_end=_interval(_whole_of(rows)),
        goodput=_goodput(rows), over_target=_over(own, target), over_sd=_over(own, _sd(chosen)),
        first_token_ms=_median(rows, lambda row: row.first_token_ms),
        gap_p50_ms=_median(rows, lambda row: row.gap_p50_ms),
        gap_p95_ms=_median(rows, lambda row: row.gap_p95_ms),
        **_usage(rows, tokens),
        mj_per_token=1e3 * sum(row.energy_j for row in rows) / max(tokens, 1),
        energy_source=first.energy_source, nats_per_token=nats, nats_below_target=below,
        agreement=_mean(rows, lambda row: row.agreement),
        regret=_mean(rows, lambda row: row.regret),
        accuracy=sum(marks) / len(marks) if marks else None,
    )  # fmt: skip


def _sd(chosen: dict[str, Rows]) -> Rows:
    """`sd` with the window that a sweep found, else with the one that was asked for."""
    return next((rows for name, rows in chosen.items() if family(name) == _SD), {})


def _mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    """Over tokens."""
    return sum(value(row) * row.tokens for row in rows) / max(sum(row.tokens for row in rows), 1)


def _median(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return float(np.median([value(row) for row in rows]))


def _goodput(rows: Sequence[Row]) -> float:
    batches = {row.batch_seconds for row in rows}
    return sum(row.tokens for row in rows) / max(sum(batches), 1e-9)


def _usage(rows: Sequence[Row], tokens: int) -> dict[str, float | None]:
    """What edges counted."""
    usages = [row.usage for row in rows if row.usage is not None]
    if not usages:
        names = (
            "acceptance", "wasted", "rollbacks", "prehits", "bytes_up", "bytes_down", "edge_busy",
            "cloud_busy",
        )  # fmt: skip
        return dict.fromkeys(names)
    accepted = sum(usage.accepted_tokens for usage in usages)
    wasted = sum(usage.wasted_tokens for usage in usages)
    tokens = max(tokens, 1)
    return {
        "acceptance": accepted / max(sum(usage.drafted_tokens for usage in usages), 1),
        "wasted": wasted / max(wasted + accepted, 1),
        "rollbacks": 100.0 * sum(usage.rollbacks for usage in usages) / tokens,
        "prehits": 100.0 * sum(usage.prehit_rejections for usage in usages) / tokens,
        "bytes_up": sum(usage.bytes_up for usage in usages) / tokens,
        "bytes_down": sum(usage.bytes_down for usage in usages) / tokens,
        "edge_busy": 1.0 - float(np.mean([usage.edge_idle for usage in usages])),
        "cloud_busy": 1.0 - float(np.mean([usage.cloud_idle for usage in usages])),
    }


# --- intervals --------------------------------------------------------------------------------

Sample = tuple[np.ndarray[Any, Any], ...]


def _speed_of(rows: Sequence[Row]) -> Sample:
    return (
        np.array([row.decode_tokens for row in rows], float),
        np.array([row.decode_seconds for row in rows], float),
    )


def _whole_of(rows: Sequence[Row]) -> Sample:
    return (
        np.array([row.tokens for row in rows], float),
        np.array([row.seconds for row in rows], float),
    )


def _over(own: Rows, others: Rows) -> Interval | None:
    """Speed on the prompts that both have answered, one ÷ the other."""
    shared = [key for key in own if key in others]
    if not shared:
        return None
    mine, theirs = _speed_of([own[k] for k in shared]), _speed_of([others[k] for k in shared])
    return _interval((*mine, *theirs))


def _ratio(*sums: Any, axis: int = -1) -> Any:
    """tokens ÷ seconds, or the ratio of two of these."""
    totals = [np.sum(part, axis=axis) for part in sums]
    speed = totals[0] / np.maximum(totals[1], 1e-9)
    if len(totals) == 2:
        return speed
    return speed / np.maximum(totals[2] / np.maximum(totals[3], 1e-9), 1e-9)


def _interval(sample: Sample) -> Interval:
    value = float(_ratio(*sample))
    if sample[0].size < 2:
        return Interval(value, value, value)
    found = bootstrap(
        sample, _ratio, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile",
        rng=np.random.default_rng(_SEED),
    )  # fmt: skip
    low, high = found.confidence_interval
    return Interval(value, float(low), float(high))


# --- for people -------------------------------------------------------------------------------


def as_table(lines: Sequence[Line]) -> Table:
    """The lines over all data sets, or those of the only one."""
    table = Table(
        title="Decoding speed and quality (measured): value, 95 % interval",
        caption="÷ alone, ÷ sd: speed over the target alone, over sd with its best window. nats: "
        "of log-likelihood a token under the target. first choice: share of tokens that are the "
        "target's own. mJ: energy a token",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown = columns(lines)
    for name in shown:
        left = name in ("method", "draft", "setting", "device")
        table.add_column(name, justify="left" if left else "right")
    for line in whole_lines(lines):
        table.add_row(*(show(line) for show in shown.values()))
    return table


def whole_lines(lines: Sequence[Line]) -> list[Line]:
    """Of each setting the lines over all data sets, or those of its only one."""
    alls = [line for line in lines if line.dataset == ALL]
    return alls or list(lines)


def columns(lines: Sequence[Line]) -> dict[str, Callable[[Line], str]]:
    """Headings and what stands below them; what is the same everywhere is left out."""
    shown: dict[str, Callable[[Line], str]] = {"method": lambda line: line.ran}
    if len({line.rtt_ms for line in lines}) > 1:
        shown["RTT, ms"] = lambda line: f"{line.rtt_ms:g}"
    if len({line.draft for line in lines}) > 1:
        shown["draft"] = lambda line: line.draft
    if len({line.variant for line in lines}) > 1:
        shown["setting"] = lambda line: line.variant or "–"
    if any(line.device != AS_IT_IS for line in lines):
        shown["device"] = lambda line: line.device
    energy = "/".join(sorted({line.energy_source for line in lines}))
    accuracy = any(line.accuracy is not None for line in lines)
    return shown | {
        "tokens/s": lambda line: str(line.speed),
        "÷ alone": lambda line: or_dash(line.over_target),
        "÷ sd": lambda line: or_dash(line.over_sd),
        "accepted": lambda line: _percent(line.acceptance),
        "in vain": lambda line: _percent(line.wasted),
        "nats": lambda line: f"{line.nats_per_token:.3f}",
        "first choice": lambda line: _percent(line.agreement),
        **({"right": lambda line: _percent(line.accuracy)} if accuracy else {}),
        f"mJ, {energy}": lambda line: f"{line.mj_per_token:.0f}",
    }


def or_dash(interval: Interval | None) -> str:
    """As people read it; a dash where there is none."""
    return "–" if interval is None else str(interval)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def as_markdown(lines: Sequence[Line]) -> str:
    """The same table for a README."""
    shown = columns(lines)
    head = f"| {' | '.join(shown)} |\n|{'---|' * len(shown)}\n"
    rows = (
        f"| {' | '.join(show(line) for show in shown.values())} |" for line in whole_lines(lines)
    )
    return head + "\n".join(rows) + "\n"
