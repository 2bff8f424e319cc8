"""Contended times, and whether the padding held: steps and passes that overran.

Workers and the baselines' server count them in files (`engines.padding.Counts`). Methods answer one
after the other, so what is added while one answers is its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import paced
from bench.contention import CONTENTION, Contention, read_contention
from bench.evaluation import baseline_server
from bench.evaluation.plan import Setting
from bench.evaluation.rows import PaddingRow
from engines.padding import Tally, read_tally

_STEPS = (paced.STEP_COUNTS, baseline_server.STEP_COUNTS)
_PASSES = (paced.PASS_COUNTS, baseline_server.PASS_COUNTS)


class PaddingMeter:
    """Counts of one setting, method by method.

    Args:
        out: the run's directory.

    Attributes:
        folder: where the counting files are; None where nothing is padded.
    """

    def __init__(self, setting: Setting, out: Path) -> None:
        self._setting = setting
        self.folder: Path | None = None
        if setting.device.padded:
            self.folder = (out / "counts").resolve()
            self.folder.mkdir(parents=True, exist_ok=True)
        self._before = self._read()

    def begin(self) -> None:
        """A method begins to answer."""
        self._before = self._read()

    def end(self, method: str) -> list[PaddingRow]:
        """It has answered: its row, or none where nothing is padded."""
        if self.folder is None:
            return []
        now, before = self._read(), self._before
        rtt_ms, draft, variant, device = self._setting.where
        return [
            PaddingRow(
                method=method, rtt_ms=rtt_ms, draft=draft, variant=variant, device=device,
                steps=now[0] - before[0], passes=now[1] - before[1],
            )
        ]  # fmt: skip

    def _read(self) -> tuple[Tally, Tally]:
        """Of steps and of passes, so far."""
        if self.folder is None:
            return Tally(), Tally()
        folder = self.folder
        return _total(read_tally(folder / name) for name in _STEPS), _total(
            read_tally(folder / name) for name in _PASSES
        )


@dataclass(frozen=True, slots=True)
class PlainTable:
    """A table, to be shown on a page, in a terminal or as Markdown."""

    title: str
    text: str
    heads: list[str]
    body: list[list[str]]


Where = tuple[str, float, str, str, str]
"""Method, round trip, draft, variant, device."""


def overruns(rows: Sequence[PaddingRow]) -> dict[Where, tuple[Tally, Tally]]:
    """Steps and passes of each method in each setting."""
    groups: dict[Where, list[PaddingRow]] = defaultdict(list)
    for row in rows:
        groups[row.method, row.rtt_ms, row.draft, row.variant, row.device].append(row)
    return {
        where: (_total(row.steps for row in own), _total(row.passes for row in own))
        for where, own in groups.items()
    }


def _total(tallies: Iterable[Tally]) -> Tally:
    return sum(tallies, start=Tally())


def padding_tables(out: Path, rows: Sequence[PaddingRow]) -> list[PlainTable]:
    """Contended times, and whether the padding held; only what a run has."""
    tables = []
    if (out / CONTENTION).exists():
        tables.append(contention_table(read_contention(out)))
    found = overruns(rows)
    if found:
        tables.append(overrun_table(found))
    return tables


def contention_table(found: Contention) -> PlainTable:
    """What the models take alone and beside each other."""
    timings = {"draft step": found.step} | {
        f"pass over {size} token{'s'[: size > 1]}": timing
        for size, timing in sorted(found.passes.items())
    }
    text = (
        "Milliseconds, medians of alternated samples: one model at a time, and while the other "
        f"runs on the other core ({found.repeats} samples each)."
    )
    body = [
        [name, f"{t.alone_ms:.1f}", f"{t.contended_ms:.1f}", f"{t.slowdown:.2f}"]
        for name, t in timings.items()
    ]
    return PlainTable("Contended times", text, ["", "alone", "contended", "×"], body)


def overrun_table(found: Mapping[Where, tuple[Tally, Tally]]) -> PlainTable:
    """Shares of steps and passes that took longer than they were padded to."""
    several = len({where[1:] for where in found}) > 1
    heads = ["method", *(["setting"] if several else []), "steps", "excess", "passes", "excess"]
    body = [
        [where[0], *([_setting_name(where)] if several else []), *_shares(steps), *_shares(passes)]
        for where, (steps, passes) in found.items()
    ]
    text = (
        "Share of draft steps and of target passes that took longer than they were padded to, and "
        "what they took beyond it, as a share of all padded time."
    )
    return PlainTable("Did the padding hold?", text, heads, body)


def _setting_name(where: Where) -> str:
    _, rtt_ms, draft, variant, device = where
    parts = [f"{rtt_ms:g} ms", f"draft {draft}", variant, paced.short_name(device)]
    return ", ".join(part for part in parts if part)


def _shares(tally: Tally) -> tuple[str, str]:
    if not tally.count:
        return "–", "–"
    return f"{tally.long / tally.count:.1%}", f"{tally.excess_s / tally.least_s:.1%}"
