"""The whole of `e2sci bench exactness`, and its table."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.datasets import in_turns
from bench.evaluation.plan import own_questions
from bench.exactness.answers import (
    Asked,
    CellAnswers,
    answers_alone,
    answers_together,
    installations,
)
from bench.exactness.design import DesignCell, Factors, design
from bench.exactness.evidence import ModelEvidence
from bench.exactness.judge import Allowance, CellResult, Difference, allowance_of, judge
from bench.progress import counting_bar
from bus.protocol.errors import ConfigurationError

_TABLE_WIDTH = 110


@dataclass(frozen=True, slots=True)
class ExactnessResult:
    """What came out.

    Attributes:
        dtype: number format that ran.
    """

    asked: Asked
    dtype: str
    cells: tuple[CellResult, ...]

    @property
    def holds(self) -> bool:
        return all(cell.holds for cell in self.cells)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "target": self.asked.target, "draft": self.asked.draft, "dtype": self.dtype,
            "prompts": len(self.asked.prompts), "max_new_tokens": self.asked.max_new_tokens,
            "excused": allowance_of(self.dtype).value, "holds": self.holds,
            "cells": [_cell_dict(result) for result in self.cells],
        }  # fmt: skip


def own_prompts(count: int) -> tuple[str, ...]:
    """This project's prompts, its sets in turns: chat, code, arithmetic, repeat and edit."""
    return tuple(question.prompt for question in in_turns(own_questions())[:count])


def run(factors: Factors, most_cells: int, asked: Asked, as_json: bool) -> bool:
    """Measure and print; whether all answers are what they must be."""
    result = measure(design(factors, most_cells), asked)
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        _print(result, Console())
    return result.holds


def measure(cells: Sequence[DesignCell], asked: Asked) -> ExactnessResult:
    """Answer, compare, and look at what differs.

    Raises:
        ConfigurationError: workers ran in different number formats.
    """
    measured: list[CellAnswers] = []
    with counting_bar() as progress:
        temperatures = sorted({cell.temperature for cell in cells})
        total = (len(cells) + len(temperatures)) * len(asked.prompts)
        task = progress.add_task("target alone", total=total)

        def tick() -> None:
            progress.advance(task)

        alone = answers_alone(asked, temperatures, tick)
        for installation, group in installations(cells):
            progress.update(task, description=f"{installation.link}, {installation.drafter}")
            measured += asyncio.run(answers_together(asked, installation, group, tick))
    formats = {one.dtype for one in measured}
    if len(formats) > 1:
        raise ConfigurationError(
            f"the cells ran in {' and '.join(sorted(formats))}; name one with --dtype"
        )
    dtype = formats.pop() if asked.dtype == "auto" else asked.dtype
    results = judge(measured, alone, allowance_of(dtype), ModelEvidence(asked))
    return ExactnessResult(asked, dtype, tuple(results))


def _cell_dict(result: CellResult) -> dict[str, Any]:
    cell = result.cell
    difference = result.difference
    return {
        "method": cell.method, "window": cell.window, "temperature": cell.temperature,
        **asdict(cell.installation), "disturbance": cell.disturbance.value,
        "seconds": result.seconds,
        "identical": result.num_identical, "excused": result.num_excused,
        "epsilon": result.epsilon, "worst_shortfall": result.worst_shortfall,
        "first_difference": None if difference is None else asdict(difference),
        "holds": result.holds,
    }  # fmt: skip


def _print(result: ExactnessResult, console: Console) -> None:
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(_table(result))
    for line in closing_lines(result):
        console.print(line, highlight=False)


def _table(result: ExactnessResult) -> Table:
    asked = result.asked
    table = Table(
        title=f"{asked.target} and {asked.draft}, {result.dtype}: {len(result.cells)} cells × "
        f"{len(asked.prompts)} prompts × {asked.max_new_tokens} tokens (measured)"
    )
    columns = (
        "method", "W", "T", "link", "drafter", "threads", "disturbed", "s", "identical", "excused",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column in {"method", "link"} else "right")
    table.add_column("first difference")
    for one in result.cells:
        cell, inst = one.cell, one.cell.installation
        table.add_row(
            cell.method, "own" if cell.window is None else str(cell.window),
            f"{cell.temperature:g}", inst.link, inst.drafter, str(inst.threads),
            cell.disturbance.value, f"{one.seconds:.1f}",
            f"{one.num_identical} of {one.num_prompts}",
            str(one.num_excused), _noted(one),
        )  # fmt: skip
    return table


def _noted(result: CellResult) -> str:
    parts = [] if result.difference is None else [_told(result.difference)]
    if result.epsilon is not None:
        parts.append(f"ε {result.epsilon:.4f}, below maximum ≤ {result.worst_shortfall:.4f}")
    return "; ".join(parts)


def _told(difference: Difference) -> str:
    place = f"prompt {difference.prompt + 1}, token {difference.position + 1}"
    parts = [f"{place}: {_word(difference.expected)} → {_word(difference.got)}"]
    if difference.lead is not None:
        parts.append(f"lead {difference.lead:.1e}")
    if difference.margin is not None:
        parts.append(f"margin {difference.margin:.1e}")
    return ", ".join(parts)


def _word(token: int | None) -> str:
    return "end" if token is None else str(token)


def closing_lines(result: ExactnessResult) -> list[str]:
    """Whether it holds, in words: at temperature 0 and above."""
    lines = []
    for greedy, what in (
        (True, "identical to the target alone"),
        (False, "above temperature 0, identical to the target alone with the same seed"),
    ):
        cells = [cell for cell in result.cells if cell.cell.greedy == greedy]
        if cells:
            lines.append(f"{what}: {_answer(cells, allowance_of(result.dtype))}")
    return lines


def _answer(cells: Sequence[CellResult], allowance: Allowance) -> str:
    if all(cell.identical for cell in cells):
        return "yes"
    if not all(cell.holds for cell in cells):
        return "no"
    if allowance is Allowance.EPSILON and cells[0].cell.greedy:
        return "not all, but every token lies within 2ε of the target's first choice"
    return f"yes, but for {sum(cell.num_excused for cell in cells)} near-ties that rounding decides"
