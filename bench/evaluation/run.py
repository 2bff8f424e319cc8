"""A whole run: settings one after the other, every answer kept, and the report."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from bench.claims import claim
from bench.contention import find_devices
from bench.datasets import Question
from bench.evaluation.paddings import padding_tables
from bench.evaluation.plan import Plan, Setting, check_baselines
from bench.evaluation.report import by_dataset, inertia_lines, write_report
from bench.evaluation.rows import AnswerRow, Key, PaddingRow, SweepRow, WindowRow
from bench.evaluation.setting import Judge, Kept, MeasuredSetting
from bench.evaluation.summary import Line, as_table, plain_table, summarise
from bench.lines import append_rows, read_all
from bench.progress import counting_bar
from bench.sandbox import Sandbox
from bench.tasks import prompt_of
from bus.protocol.errors import ConfigurationError
from dashboard.evidence import SUMMARY
from engines.torch.oracle import RecordedAnswer

ROWS, WINDOWS, SWEEPS, PADDINGS, ANSWERS = (
    "rows.jsonl", "windows.jsonl", "sweeps.jsonl", "paddings.jsonl", "answers.jsonl",
)  # fmt: skip
_FILES: dict[type, str] = {
    AnswerRow: ROWS, WindowRow: WINDOWS, SweepRow: SWEEPS, PaddingRow: PADDINGS,
}  # fmt: skip
MAY_GROW = ("methods", "limit", "rtts_ms", "drafts", "variations", "paced")
_TABLE_WIDTH = 144


def run(plan: Plan, out: Path, as_json: bool) -> list[Line]:
    """Measure what is still missing under `out`, summarise all of it, and write the report.

    Raises:
        ConfigurationError: `out` holds another plan's run, or a data set cannot be used.
    """
    check_baselines(plan)
    sandbox = Sandbox() if plan.run_code else None
    measured, others = plan.questions()
    claim(out, plan, MAY_GROW)
    done = frozenset(row.key for row in read_all(out / ROWS, AnswerRow))
    devices = find_devices(plan.paced, out, plan.target, plan.draft, plan.dtype)
    counts = {s: _num_missing(plan, s, measured, done) for s in plan.settings(devices)}
    missing = {setting: count for setting, count in counts.items() if count}
    if missing:
        judge = Judge(plan.target, plan.dtype, sandbox)
        if any(setting.error_rate is not None for setting in missing):
            _record_answers(plan, judge, [*measured, *others], out / ANSWERS)
        _measure(plan, missing, judge, measured, others, done, out)
    return report(out, as_json)


def report(out: Path, as_json: bool) -> list[Line]:
    """Summarise what a directory holds, and write its report.

    Raises:
        ConfigurationError: it holds no rows.
    """
    rows, windows = read_all(out / ROWS, AnswerRow), read_all(out / WINDOWS, WindowRow)
    if not rows:
        raise ConfigurationError(f"{out} holds no rows of `e2sci bench`")
    lines = summarise(rows)
    (out / SUMMARY).write_bytes(msgspec.json.Encoder().encode_lines(lines))
    found = by_dataset(windows)
    tables = padding_tables(out, read_all(out / PADDINGS, PaddingRow))
    path = write_report(out, rows, windows, lines, found, tables)
    if as_json:
        for line in lines:
            print(msgspec.json.encode(line).decode())
    else:
        console = Console()
        console.width = max(console.width, _TABLE_WIDTH)
        console.print(as_table(lines))
        for table in tables:
            console.print(plain_table(table))
        for text in inertia_lines(found):
            console.print(text)
        console.print(f"report: {path}")
    return lines


def _num_missing(
    plan: Plan, setting: Setting, measured: Sequence[Question], done: frozenset[Key]
) -> int:
    return sum(
        setting.key(method, question) not in done
        for method in plan.methods
        for question in measured
    )


def _measure(
    plan: Plan, missing: dict[Setting, int], judge: Judge, measured: Sequence[Question],
    others: Sequence[Question], done: frozenset[Key], out: Path,
) -> None:  # fmt: skip
    with counting_bar() as progress:
        task = progress.add_task("answers", total=sum(missing.values()))
        for setting in missing:
            progress.update(task, description=str(setting))
            part = MeasuredSetting(
                plan, setting, judge, out / ANSWERS, done, read_all(out / SWEEPS, SweepRow),
                keep=lambda rows: _append(out, rows), tick=lambda: progress.advance(task),
            )  # fmt: skip
            asyncio.run(part.run(measured, others))


def _append(out: Path, rows: Sequence[Kept]) -> None:
    """Windows first: an answer counts as done with its row."""
    for kind in (WindowRow, SweepRow, PaddingRow, AnswerRow):
        own = [row for row in rows if isinstance(row, kind)]
        if own:
            append_rows(out / _FILES[kind], own)


def _record_answers(plan: Plan, judge: Judge, questions: Sequence[Question], path: Path) -> None:
    """The target's own answers, which oracles replay."""
    known = {recorded.prompt for recorded in read_all(path, RecordedAnswer)}
    prompts = dict.fromkeys(judge.encode(prompt_of(question)) for question in questions)
    missing = [prompt for prompt in prompts if prompt not in known]
    with counting_bar() as progress:
        for prompt in progress.track(missing, description="the target's own answers"):
            answer = judge.own_answer(prompt, plan.max_new_tokens)
            append_rows(path, [RecordedAnswer(prompt, answer)])
