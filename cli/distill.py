"""`e2sci distill` and `e2sci train`: the progress bar and the figures at the end."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from bus.protocol.errors import ConfigurationError
from engines.torch.loading import load_causal_lm
from training.distill.evaluation import DraftQuality
from training.distill.run import DistillSettings, Result
from training.distill.run import distill as run_distill
from training.speculators.run import Report

__all__ = ["TrainingBar", "distill", "parse_layers", "print_report"]

_SMOOTHING = 0.1  # weight of the newest step in the loss and the speed shown


def distill(
    settings: DistillSettings, target: str, dtype: str, device: str, as_json: bool
) -> Result:
    """Make a draft and print what came of it."""
    with TrainingBar() as bar:
        bar.phase("loading")
        model = load_causal_lm(target, dtype, device)
        result = run_distill(settings, model, bar)
    if as_json:
        print(json.dumps({"draft": str(settings.out)} | asdict(result)))
    else:
        _print(result, settings.out)
    return result


def parse_layers(text: str) -> tuple[int, ...] | int:
    """`6`, or `0,1,2,3,28,29`.

    Raises:
        ConfigurationError: neither.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigurationError(
            f"--layers {text!r}: expected how many (6) or which of the target's layers (0,1,28,29)"
        )
    numbers = tuple(int(part) for part in parts)
    return numbers if len(numbers) > 1 or text.endswith(",") else numbers[0]


class TrainingBar:
    """One bar a phase, on stderr, with loss, tokens a second and the time left."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description:10}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task: TaskID | None = None
        self._loss = self._speed = 0.0
        self._last = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def phase(self, name: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1.0)
        self._task = self._progress.add_task(name, total=1.0, note="")
        self._loss = self._speed = 0.0
        self._last = time.monotonic()

    def advance(self, share: float, tokens: int, loss: float | None = None) -> None:
        now = time.monotonic()
        if tokens:
            speed = tokens / max(now - self._last, 1e-6)
            self._speed = _smooth(self._speed, speed)
        self._last = now
        note = f"{self._speed:.0f} tokens/s" if self._speed else ""
        if loss is not None:
            self._loss = _smooth(self._loss, loss)
            note = f"loss {self._loss:.3f}  {note}"
        assert self._task is not None
        self._progress.update(self._task, completed=min(share, 1.0), note=note)


def _smooth(old: float, new: float) -> float:
    return new if not old else (1 - _SMOOTHING) * old + _SMOOTHING * new


def _figures(quality: DraftQuality) -> tuple[tuple[str, float], ...]:
    return (
        ("agreement with the target's choice", quality.agreement),
        ("overlap 1 − TV", quality.overlap),
        ("mean JSD, nats", quality.mean_jsd),
        ("accepted of a window of 4", quality.accepted[4]),
    )


def _print(result: Result, out: Path) -> None:
    table = Table(title=f"on {result.final.num_tokens} answer tokens held out (measured)")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in zip(_figures(result.initial), _figures(result.final), strict=True):
        (label, before), (_, after) = row
        table.add_row(label, f"{before:.3f}", f"{after:.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"{result.train_tokens} answer tokens, {result.seen_tokens} learnt from in "
        f"{result.steps} steps, {result.seconds / 60:.1f} minutes"
    )
    console.print(f"use it: e2sci generate --draft {out} …", soft_wrap=True)


def print_report(report: Report, out: Path) -> None:
    """What a speculator foresees, beside what counting foresees."""
    depth = report.final.depth
    title = f"of {depth} tokens, on {report.final.positions} positions held out (measured)"
    table = Table(title=title)
    table.add_column("")
    for heading in ("accepted", *(f"place {place}" for place in range(depth))):
        table.add_column(heading, justify="right")
    for name, quality in ((report.kind, report.final), *report.others.items()):
        shares = (f"{share:.2f}" for share in quality.right)
        table.add_row(name, f"{quality.accepted:.2f}", *shares)
    console = Console()
    console.print(table)
    console.print(
        f"{report.train_tokens} answer tokens, {report.seen_tokens} learnt from in "
        f"{report.steps} steps, {report.seconds / 60:.1f} minutes"
    )
    console.print(f"use it: e2sci generate --speculator {out} …", soft_wrap=True)
