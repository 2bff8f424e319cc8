"""Measure, show and keep: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.datasets import read_questions
from bench.int8.answers import read_answers
from bench.int8.passes import DRAFT, INT8, LLAMA_CPP, PassTable, measure
from bench.int8.quality import FormatQuality, compare
from bench.passes import CONTEXT, PASS_SIZES
from bench.progress import counting_bar
from bench.prompts import SETS
from bench.tasks import prompt_of
from engines.catalog.registry import Specs

_RESULT, _ANSWERS = "int8.json", "answers.jsonl"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        files: benchmark sets as JSON lines; without any, the project's own prompts.
        num_tokens: of answers, over all sets; 0 leaves the quality out.
        repeats: of each pass; 0 leaves the passes out.
        float32: whether passes are timed in float32 too.
        llama_python: an interpreter with llama-cpp-python, to time its passes too.
    """

    specs: Specs
    files: tuple[Path, ...] = ()
    num_tokens: int = 2000
    repeats: int = 15
    float32: bool = False
    llama_python: Path | None = None


def run(plan: Plan, out: Path | None, as_json: bool) -> None:
    """Measure as planned, print, and write `int8.json` and `answers.jsonl` into `out`.

    Raises:
        ConfigurationError, ModelError: what was asked for cannot be measured.
    """
    prompts = read_prompts(plan.files)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with counting_bar() as bar:
        quality = _quality(plan, prompts, out, bar) if plan.num_tokens else []
        passes = _passes(plan, bar) if plan.repeats else None
    machine = machine_name()
    result = {
        "machine": machine, "target": plan.specs.target, "draft": plan.specs.draft,
        "quality": [asdict(row) for row in quality],
        "passes": None if passes is None else passes.as_json(),
    }  # fmt: skip
    if out is not None:
        (out / _RESULT).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if as_json:
        print(json.dumps(result))
        return
    console = Console()
    if quality:
        console.print(quality_table(quality))
    if passes is not None:
        console.print(pass_table(passes, machine))
        console.print(", ".join(f"{name} {value:.2f}" for name, value in _own_ratios(passes)))


def read_prompts(files: Sequence[Path]) -> Mapping[str, Sequence[str]]:
    """Set → what is asked.

    Raises:
        ConfigurationError: a file cannot be used.
    """
    if not files:
        return SETS
    return {path.stem: [prompt_of(question) for question in read_questions(path)] for path in files}


def machine_name() -> str:
    """The processor's name and how many cores this process may use."""
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    for line in lines:
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {cores}"
    return f"{platform.processor() or platform.machine()}, {cores}"


def quality_table(rows: Sequence[FormatQuality]) -> Table:
    """KL and first choices, target and draft, over all answers and by set."""
    table = Table(
        title="int8 against float32 of the same weights, teacher-forced (measured)",
        caption="KL(float32 ‖ int8) in nats, over the rows of the head; first: same first choice; "
        "|Δ ln p|: of the answer's tokens",
    )
    for heading in ("model", "answers to"):
        table.add_column(heading)
    for heading in ("tokens", "mean KL", "median", "p99", "first", "|Δ ln p|"):
        table.add_column(heading, justify="right")
    for row in rows:
        shift = "–" if row.mean_shift is None else f"{row.mean_shift:.3f}"
        table.add_row(
            row.role, row.prompt_set, str(row.num_tokens), f"{row.mean_kl:.5f}",
            f"{row.median_kl:.5f}", f"{row.p99_kl:.4f}", f"{row.same_first:.1%}", shift,
        )  # fmt: skip
    return table


def pass_table(passes: PassTable, machine: str) -> Table:
    """Medians and, in brackets, minima in milliseconds; then int8's median ÷ the others'."""
    table = Table(
        title=f"One core of {machine}: target passes after {CONTEXT} tokens, ms: median (minimum), "
        "measured, interleaved",
        caption=f"floor {passes.floor_ms:.1f} ms: {passes.weight_bytes / 1e6:.0f} MB of weights at "
        f"{passes.bandwidth / 1e9:.1f} GB/s",
    )
    others = passes.kinds[1:]
    named = {LLAMA_CPP: f"llama.cpp {passes.gguf}"}
    headings = ["tokens", INT8, *(named.get(kind, kind) for kind in others)]
    for heading in [*headings, *(f"int8 ÷ {kind}" for kind in others)]:
        table.add_column(heading, justify="right")
    shown = {(t.kind, t.num_tokens): f"{t.median_ms:.1f} ({t.min_ms:.1f})" for t in passes.timings}
    ratios = passes.ratios()
    for size in PASS_SIZES:
        cells = [shown[kind, size] for kind in (INT8, *others)]
        table.add_row(
            str(size), *cells, *(f"{ratios[f'int8/{kind} at {size}']:.2f}" for kind in others)
        )
    table.add_section()
    table.add_row(DRAFT, shown[DRAFT, 1])
    return table


def _own_ratios(passes: PassTable) -> list[tuple[str, float]]:
    return [(name, value) for name, value in passes.ratios().items() if not name.startswith("int8")]


def _quality(
    plan: Plan, prompts: Mapping[str, Sequence[str]], out: Path | None, bar: Progress
) -> list[FormatQuality]:
    task = bar.add_task("answer tokens", total=plan.num_tokens)
    keep = None if out is None else out / _ANSWERS
    answers = read_answers(
        plan.specs.target, prompts, plan.num_tokens, keep, lambda count: bar.advance(task, count)
    )

    def begin(what: str, total: int) -> Callable[[], None]:
        step = bar.add_task(what, total=total)
        return lambda: bar.advance(step)

    return compare(plan.specs, answers, begin)


def _passes(plan: Plan, bar: Progress) -> PassTable:
    task = bar.add_task("passes", total=plan.repeats)
    return measure(
        plan.specs, plan.float32, plan.llama_python, plan.repeats, lambda: bar.advance(task)
    )
