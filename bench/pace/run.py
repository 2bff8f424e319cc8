"""A whole run: settings one after the other, each kept as soon as it is complete."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence, Set
from dataclasses import asdict
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress

from bench.claims import PLAN, claim
from bench.contention import CONTENTION, find_devices, read_contention
from bench.evaluation.paddings import contention_table
from bench.evaluation.summary import plain_table
from bench.lines import append_rows
from bench.pace.alone import TargetAlone, alone_row
from bench.pace.plan import Plan, Setting
from bench.pace.rows import (
    NO_DRAFT,
    PaceRow,
    TimelineRow,
    read_rows,
    read_stack_rows,
    read_timeline_rows,
    rewrite,
)
from bench.pace.stacks import MeasuredStack
from bench.pace.summary import PaceCell, as_table, summarise
from bench.paced import Device
from bench.progress import counting_bar
from bench.prompts import PROMPTS
from bus.protocol.errors import ConfigurationError
from engines.torch.oracle import write_answers

ROWS, STACKS, TIMELINES, ANSWERS = (
    "rows.jsonl", "stacks.jsonl", "timelines.jsonl", "answers.jsonl",
)  # fmt: skip

_TABLE_WIDTH = 110


def run(plan: Plan, out: Path, as_json: bool) -> list[PaceCell]:
    """Measure what is still missing under `out`, and print the summary of all.

    Raises:
        ConfigurationError: `out` holds another plan's run.
    """
    claim(out, plan, may_grow=("rtts_ms", "error_rates", "drafts"))
    stacks = read_stack_rows(out / STACKS)
    done = {Setting(stack.draft, stack.error_rate, stack.rtt_ms) for stack in stacks}
    _forget_unfinished(out, done)
    (device,) = find_devices((plan.device,), out, plan.target, plan.drafts[0], plan.dtype)
    missing = [setting for setting in plan.settings if setting not in done]
    with counting_bar() as progress:
        _measure(plan, missing, device, out, progress)
    cells = summarise(read_rows(out / ROWS), read_stack_rows(out / STACKS))
    if as_json:
        for cell in cells:
            print(json.dumps(asdict(cell) | {"of_ceiling": cell.of_ceiling, "device": device.name}))
    else:
        console = Console()
        console.width = max(console.width, _TABLE_WIDTH)
        console.print(as_table(cells, device.name))
        if (out / CONTENTION).exists():
            console.print(plain_table(contention_table(read_contention(out))))
    return cells


def load_plan(out: Path) -> Plan:
    """The plan of the run in a directory, without its links and drafts.

    Raises:
        ConfigurationError: there is none.
    """
    try:
        return msgspec.json.decode((out / PLAN).read_bytes(), type=Plan)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"{out} holds no run of `e2sci bench pace`: {error}") from error


def _forget_unfinished(out: Path, done: Set[Setting]) -> None:
    """Drop what a run left that was killed while it wrote: a setting's stack is written last, the
    answers after the target's own rows."""
    if not (out / ANSWERS).exists():
        (out / ROWS).unlink(missing_ok=True)
    rows, timelines = read_rows(out / ROWS), read_timeline_rows(out / TIMELINES)
    kept = [row for row in rows if row.draft == NO_DRAFT or _setting(row) in done]
    if len(kept) < len(rows):
        rewrite(out / ROWS, kept)
    finished = [row for row in timelines if _setting(row) in done]
    if len(finished) < len(timelines):
        rewrite(out / TIMELINES, finished)


def _setting(row: PaceRow | TimelineRow) -> Setting:
    return Setting(row.draft, row.error_rate, row.rtt_ms)


def _measure(
    plan: Plan, missing: Sequence[Setting], device: Device, out: Path, progress: Progress
) -> None:
    if not missing:
        return
    task = progress.add_task("the target alone", total=len(missing) * plan.repeats * plan.prompts)
    prompts = PROMPTS[: plan.prompts]
    alone = TargetAlone(plan.target, plan.dtype, prompts, plan.max_new_tokens, device)
    answers = out / ANSWERS
    if not answers.exists():
        recorded = [alone.answer(index) for index in range(plan.prompts)]
        append_rows(out / ROWS, [alone_row(*pair, index) for index, pair in enumerate(recorded)])
        write_answers(answers, [answer for answer, _ in recorded])
    for setting in missing:
        progress.update(task, description=str(setting))
        stack = MeasuredStack(
            plan, setting, device, answers.resolve(), alone if setting.error_rate is None else None,
            tick=lambda: progress.advance(task),
        )  # fmt: skip
        rows, timelines, about = asyncio.run(stack.run())
        append_rows(out / ROWS, rows)
        at = (setting.draft, setting.error_rate, setting.rtt_ms)
        append_rows(out / TIMELINES, [TimelineRow(*at, timeline) for timeline in timelines])
        append_rows(out / STACKS, [about])
