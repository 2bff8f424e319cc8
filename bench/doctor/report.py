"""What the doctor has found, for people and for programs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from bench.doctor.checks import Check, Status
from bench.doctor.expect import ALONE, METHODS, Expectation
from bench.doctor.network import LinkFigures

__all__ = ["Report", "show"]

_MARKS = {Status.OK: "[green]✓[/]", Status.WARNING: "[yellow]![/]", Status.FAILED: "[red]✗[/]",
          Status.SKIPPED: "[dim]–[/]"}  # fmt: skip


class Report(msgspec.Struct, frozen=True):
    """All checks in their order, measured links, and the speed to expect, where it is known."""

    checks: tuple[Check, ...]
    links: tuple[LinkFigures, ...] = ()
    expectation: Expectation | None = None

    @property
    def ok(self) -> bool:
        """Whether no check has failed; warnings are allowed."""
        return all(check.status is not Status.FAILED for check in self.checks)

    def to_builtins(self) -> dict[str, Any]:
        """As `--json` prints it, without the answers that the acceptance was counted on."""
        plain: dict[str, Any] = {"ok": self.ok, **msgspec.to_builtins(self)}
        if plain["expectation"] is not None:
            del plain["expectation"]["costs"]["hits"]
        return plain


def show(report: Report, console: Console) -> None:
    """A line for each check, its advice below it, then a table of predictions and a summary."""
    lines = Table.grid(padding=(0, 1))
    for check in report.checks:
        text = check.sentence if not check.advice else f"{check.sentence}\n→ {check.advice}"
        lines.add_row(_MARKS[check.status], _plain(text))
    console.print(lines)
    if report.expectation is not None:
        console.print(_speeds(report.expectation))
    console.print(_summary(report))


def _plain(text: str) -> str:
    """Brackets as they are, not as rich's markup."""
    return text.replace("[", r"\[")


def _speeds(expectation: Expectation) -> Table:
    table = Table(
        title="Tokens/s (predicted)",
        caption="e2sci: at least; it also accepts tokens at which the draft is not right",
    )
    for heading in ("round trip", ALONE, *METHODS):
        table.add_column(heading, justify="right")
    for link in expectation.links:
        name = {"none": "no link"}.get(link.rtt_source, f"{link.rtt_ms:.1f} ms, {link.rtt_source}")
        speeds = (f"{link.tokens_per_s[method]:.1f}" for method in (ALONE, *METHODS))
        table.add_row(name, *speeds)
    return table


def _summary(report: Report) -> str:
    counts = Counter(check.status for check in report.checks)
    warnings = _counted(counts[Status.WARNING], "warning")
    if counts[Status.FAILED]:
        return f"[red]{_counted(counts[Status.FAILED], 'check')} failed[/], {warnings}."
    return f"Nothing is wrong; {warnings}." if counts[Status.WARNING] else "Nothing is wrong."


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
