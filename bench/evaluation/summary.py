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

from bench.evaluation.paddings import PlainTable
from bench.evaluation.plan import TARGET
from bench.evaluation.rows import AnswerRow
from bench.paced import AS_IT_IS, short_name
from bench.ranges import Interval, paired_interval
from dashboard.evidence import ALL, family

_SD, _OURS = "sd", "e2sci"


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
        dtype: number format of the models.
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
    dtype: str
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


class Duel(msgspec.Struct, frozen=True, kw_only=True):
    """The speed of `method`, which is `e2sci` or lies over another method, ÷ that of `other` on one
    data set, on the same prompts."""

    method: str
    other: str
    dataset: str
    rtt_ms: float
    draft: str
    variant: str
    device: str
    ratio: Interval


Where = tuple[float, str, str, int, str]
Rows = dict[tuple[str, int], AnswerRow]
"""(data set, prompt) → row."""


def summarise(rows: Sequence[AnswerRow]) -> list[Line]:
    """Lines in the order in which methods were asked for, all data sets together first."""
    return [
        _line(method, own, chosen, dataset)
        for methods in _settings(rows).values()
        for dataset, chosen in _by_dataset(methods)
        for method, own in chosen.items()
        if own
    ]


def duels(rows: Sequence[AnswerRow]) -> list[Duel]:
    """The first `e2sci` that was asked for against all other methods, and each `e2sci+HOST` against
    the first HOST; none where they were not asked for."""
    return [
        Duel(
            method=mine, other=other, dataset=dataset, rtt_ms=rtt_ms, draft=draft,
            variant=variant, device=device, ratio=ratio,
        )
        for (rtt_ms, draft, variant, _, device), methods in _settings(rows).items()
        for mine, other in _matches(list(methods))
        for dataset, chosen in _by_dataset(methods)
        if (ratio := _over(chosen[mine], chosen[other])) is not None
    ]  # fmt: skip


def _matches(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Who is compared with whom."""
    ours = [name for name in methods if family(name) == _OURS][:1]
    matches = [(mine, other) for mine in ours for other in methods if other != mine]
    for name in methods:
        _, overlay, host = family(name).partition(f"{_OURS}+")
        hosts = [other for other in methods if overlay and family(other) == host]
        matches += [(name, other) for other in hosts[:1]]
    return matches


def _settings(rows: Sequence[AnswerRow]) -> dict[Where, dict[str, Rows]]:
    """Where → method → its rows."""
    settings: dict[Where, dict[str, Rows]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        where = (row.rtt_ms, row.draft, row.variant, row.clients, row.device)
        settings[where][row.method][row.dataset, row.prompt_id] = row
    return settings


def _by_dataset(methods: dict[str, Rows]) -> list[tuple[str, dict[str, Rows]]]:
    """Each data set with the rows of all methods; all of them together first, if several."""
    datasets = list(dict.fromkeys(name for own in methods.values() for name, _ in own))
    return [
        (dataset, {method: _of(own, dataset) for method, own in methods.items()})
        for dataset in ([ALL] if len(datasets) > 1 else []) + datasets
    ]


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
        variant=first.variant, clients=first.clients, device=first.device, dtype=first.dtype,
        source=first.source,
        prompts=len(rows), tokens=tokens,
        speed=paired_interval(_speed_of(rows), _ratio),
        end_to_end=paired_interval(_whole_of(rows), _ratio),
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


def _mean(rows: Sequence[AnswerRow], value: Callable[[AnswerRow], float]) -> float:
    """Over tokens."""
    return sum(value(row) * row.tokens for row in rows) / max(sum(row.tokens for row in rows), 1)


def _median(rows: Sequence[AnswerRow], value: Callable[[AnswerRow], float]) -> float:
    return float(np.median([value(row) for row in rows]))


def _goodput(rows: Sequence[AnswerRow]) -> float:
    """Committed tokens a second; the time of prompts answered at once counts once. Rows
    written before batches had names are distinguished by their time."""
    batches = {row.batch or row.batch_seconds: row.batch_seconds for row in rows}
    return sum(row.tokens for row in rows) / max(sum(batches.values()), 1e-9)


def _usage(rows: Sequence[AnswerRow], tokens: int) -> dict[str, float | None]:
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


def _speed_of(rows: Sequence[AnswerRow]) -> Sample:
    return (
        np.array([row.decode_tokens for row in rows], float),
        np.array([row.decode_seconds for row in rows], float),
    )


def _whole_of(rows: Sequence[AnswerRow]) -> Sample:
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
    return paired_interval((*mine, *theirs), _ratio)


def _ratio(*sums: Any, axis: int = -1) -> Any:
    """tokens ÷ seconds, or the ratio of two of these."""
    totals = [np.sum(part, axis=axis) for part in sums]
    speed = totals[0] / np.maximum(totals[1], 1e-9)
    if len(totals) == 2:
        return speed
    return speed / np.maximum(totals[2] / np.maximum(totals[3], 1e-9), 1e-9)


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
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    for line in whole_lines(lines):
        table.add_row(*(show(line) for show in shown.values()))
    return table


def whole_lines(lines: Sequence[Line]) -> list[Line]:
    """Of each setting the lines over all data sets, or those of its only one."""
    alls = [line for line in lines if line.dataset == ALL]
    return alls or list(lines)


def columns(lines: Sequence[Line]) -> dict[str, Callable[[Line], str]]:
    """Headings and what stands below them; what is the same everywhere, or was not measured, is
    left out."""
    shown: dict[str, Callable[[Line], str]] = {"method": lambda line: line.ran}
    if len({line.rtt_ms for line in lines}) > 1:
        shown["RTT, ms"] = lambda line: f"{line.rtt_ms:g}"
    if len({line.draft for line in lines}) > 1:
        shown["draft"] = lambda line: line.draft
    if len({line.variant for line in lines}) > 1:
        shown["setting"] = lambda line: line.variant or "–"
    if any(line.device != AS_IT_IS for line in lines):
        shown["device"] = lambda line: short_name(line.device)
    energy = "/".join(sorted({line.energy_source for line in lines}))
    accuracy = any(line.accuracy is not None for line in lines)
    alone = any(line.over_target for line in lines)
    lockstep = any(line.over_sd for line in lines)
    return shown | {
        "tokens/s": lambda line: str(line.speed),
        **({"÷ alone": lambda line: or_dash(line.over_target)} if alone else {}),
        **({"÷ sd": lambda line: or_dash(line.over_sd)} if lockstep else {}),
        "accepted": lambda line: _percent(line.acceptance),
        "wasted": lambda line: _percent(line.wasted),
        "nats": lambda line: f"{line.nats_per_token:.3f}",
        "first choice": lambda line: _percent(line.agreement),
        **({"right": lambda line: _percent(line.accuracy)} if accuracy else {}),
        f"mJ, {energy}": lambda line: f"{line.mj_per_token:.0f}",
    }


def or_dash(interval: Interval | None) -> str:
    """As people read it; a dash where there is none."""
    return "–" if interval is None else str(interval)


def duel_table(found: Sequence[Duel]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows, an opponent each, with a column for each data set."""
    datasets = list(dict.fromkeys(duel.dataset for duel in found))
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for duel in found:
        where = where_of(duel, found)
        cells[f"{duel.method} ÷ {duel.other}{where}"][duel.dataset] = str(duel.ratio)
    body = [[name, *(own.get(dataset, "–") for dataset in datasets)] for name, own in cells.items()]
    return ["speed", *datasets], body


def where_of(one: Line | Duel, others: Sequence[Line | Duel]) -> str:
    """What tells its setting from the others', to stand behind a name."""
    parts = []
    if len({other.rtt_ms for other in others}) > 1:
        parts.append(f"{one.rtt_ms:g} ms")
    if len({other.draft for other in others}) > 1:
        parts.append(f"draft {one.draft}")
    if len({other.variant for other in others}) > 1:
        parts.append(one.variant or "as usual")
    if len({other.device for other in others}) > 1:
        parts.append(short_name(one.device))
    return "".join(f", {part}" for part in parts)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def plain_table(plain: PlainTable) -> Table:
    """For a terminal."""
    table = Table(title=plain.title, caption=plain.text, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(plain.heads):
        table.add_column(name, justify="right" if index else "left")
    for row in plain.body:
        table.add_row(*row)
    return table


def as_markdown(
    lines: Sequence[Line], found: Sequence[Duel] = (), others: Sequence[PlainTable] = ()
) -> str:
    """The same tables for a README."""
    shown = columns(lines)
    text = _markdown(
        list(shown), [[show(line) for show in shown.values()] for line in whole_lines(lines)]
    )
    parts = [text, *([_markdown(*duel_table(found))] if found else [])]
    return "\n".join([*parts, *(_markdown(other.heads, other.body) for other in others)])


def _markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
