"""Contended times, and whether the padding held: steps and passes that overran.

Workers and the baselines' server count them in files (`models.padding.Counts`). Methods answer one
after the other, so what is added while one answers is its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import paced
from bench.contention import CONTENTION, Contention, read_contention
from bench.evaluation import baseline_server
from bench.evaluation.plan import Setting
from bench.evaluation.rows import PaddingRow
from models.padding import read_counts

_STEPS = (paced.STEP_COUNTS, baseline_server.STEP_COUNTS)
_PASSES = (paced.PASS_COUNTS, baseline_server.PASS_COUNTS)
Counted = tuple[int, int, int, int]


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
        steps, long_steps, passes, long_passes = (
            now - before for now, before in zip(self._read(), self._before, strict=True)
        )
        rtt_ms, draft, variant, device = self._setting.where
        return [
            PaddingRow(
                method=method, rtt_ms=rtt_ms, draft=draft, variant=variant, device=device,
                steps=steps, long_steps=long_steps, passes=passes, long_passes=long_passes,
            )
        ]  # fmt: skip

    def _read(self) -> Counted:
        if self.folder is None:
            return 0, 0, 0, 0
        steps = [read_counts(self.folder / name) for name in _STEPS]
        passes = [read_counts(self.folder / name) for name in _PASSES]
        return (
            sum(total for total, _ in steps), sum(long for _, long in steps),
            sum(total for total, _ in passes), sum(long for _, long in passes),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlainTable:
    """A table, to be shown on a page, in a terminal or as Markdown."""

    title: str
    text: str
    heads: list[str]
    body: list[list[str]]


@dataclass(frozen=True, slots=True)
class Overruns:
    """Shares of steps and passes that took longer than they were padded to; None without any."""

    method: str
    rtt_ms: float
    draft: str
    variant: str
    device: str
    steps: float | None
    passes: float | None

    @property
    def where(self) -> str:
        """The setting, for a table."""
        parts = [
            f"{self.rtt_ms:g} ms",
            f"draft {self.draft}",
            self.variant,
            paced.short_name(self.device),
        ]
        return ", ".join(part for part in parts if part)


def overruns(rows: Sequence[PaddingRow]) -> list[Overruns]:
    """One for each method in each setting."""
    groups: dict[tuple[str, float, str, str, str], list[PaddingRow]] = defaultdict(list)
    for row in rows:
        groups[row.method, row.rtt_ms, row.draft, row.variant, row.device].append(row)
    return [
        Overruns(
            *key,
            _share([(row.steps, row.long_steps) for row in own]),
            _share([(row.passes, row.long_passes) for row in own]),
        )
        for key, own in groups.items()
    ]


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


def overrun_table(found: Sequence[Overruns]) -> PlainTable:
    """Shares of steps and passes that took longer than they were padded to."""
    several = len({(one.rtt_ms, one.draft, one.variant, one.device) for one in found}) > 1
    heads = ["method", *(["setting"] if several else []), "steps", "passes"]
    body = [
        [one.method, *([one.where] if several else []), _percent(one.steps), _percent(one.passes)]
        for one in found
    ]
    text = "Share of draft steps and target passes that took longer than they were padded to."
    return PlainTable("Did the padding hold?", text, heads, body)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _share(counts: Sequence[tuple[int, int]]) -> float | None:
    total = sum(total for total, _ in counts)
    return sum(long for _, long in counts) / total if total else None
