"""`e2sci bench overhead`: what a window costs outside the models, and what the models cost.

Measured on real processes: edge worker and cloud worker pinned to one core each, Redis, controller
and this client sharing those cores. Overhead is the time from one feedback handled to the next
minus what the two models took: sockets, codec, state machines, event loops, thread hand-overs.
"""

from __future__ import annotations

import asyncio
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.cores import one_core, pin
from bench.passes import PassTiming, measure_passes, num_ticks
from bench.prompts import PROMPTS
from bench.telemetry import read_telemetry
from bus.client import Client
from bus.store import WindowEntry
from engines.torch.drafter import ModelDrafter
from engines.torch.loading import load_causal_lm
from engines.torch.target import TargetModel
from launch.stack import Stack, StackOptions


@dataclass(frozen=True, slots=True)
class WindowCosts:
    """Medians over sessions of a session's mean, in milliseconds a window."""

    num_windows: int
    cycle_ms: float
    draft_ms: float
    verify_ms: float
    overhead_ms: float
    rtt_ms: float
    queue_ms: float


def run(prompts: int, max_new_tokens: int, repeats: int, dtype: str, as_json: bool) -> None:
    """Measure and print: tables for people, one JSON object on one line for programs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("windows", total=prompts)
        tick = lambda: progress.advance(task)  # noqa: E731 - a name for one argument
        costs = asyncio.run(_measure_windows(prompts, max_new_tokens, dtype, tick))
        task = progress.add_task("passes", total=num_ticks(repeats))
        timings = _measure_models(repeats, dtype, tick)
    if as_json:
        passes = [asdict(t) | {"ratio": t.ratio, "floor_ms": t.floor_ms} for t in timings]
        print(json.dumps({"windows": asdict(costs), "passes": passes}))
    else:
        _print(costs, timings)


async def _measure_windows(
    prompts: int, max_new_tokens: int, dtype: str, tick: Callable[[], None]
) -> WindowCosts:
    stack = Stack(StackOptions(threads=1, dtype=dtype), log=lambda _: None)
    await stack.start()
    try:
        pin(stack)
        async with Client(redis_url=stack.redis_url) as client:
            for prompt in (PROMPTS * prompts)[:prompts]:
                await client.generate(prompt, method="sd", max_new_tokens=max_new_tokens)
                tick()
        entries = await read_telemetry(stack.redis_url)
        return _summarize([entry for entry in entries if isinstance(entry, WindowEntry)])
    finally:
        await stack.stop()


def _summarize(entries: list[WindowEntry]) -> WindowCosts:
    """A session's first window waits for the prompt's prefill and is left out."""
    sessions: dict[str, list[WindowEntry]] = defaultdict(list)
    for entry in entries:
        sessions[entry.session].append(entry)
    rows = []
    for windows in sessions.values():
        rest = windows[1:]
        if len(rest) < 2:
            continue
        cycle_ms = (windows[-1].at_ms - windows[0].at_ms) / len(rest)
        draft_ms = statistics.fmean(w.draft_ms for w in rest)
        verify_ms = statistics.fmean(w.verify_ms for w in rest)
        rtt_ms = statistics.fmean(w.rtt_ms for w in rest)
        queue_ms = statistics.fmean(w.queue_ms for w in rest)
        overhead_ms = cycle_ms - draft_ms - verify_ms
        rows.append((cycle_ms, draft_ms, verify_ms, overhead_ms, rtt_ms, queue_ms))
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    return WindowCosts(len(entries), *medians)


def _measure_models(repeats: int, dtype: str, tick: Callable[[], None]) -> list[PassTiming]:
    with one_core():
        target = TargetModel.load("default", dtype)
        draft = ModelDrafter.load("default", dtype)
        plain = load_causal_lm("default", dtype).model
        return measure_passes(target, draft, plain, repeats, tick)


def _print(costs: WindowCosts, timings: list[PassTiming]) -> None:
    console = Console()
    bandwidth = timings[0].bandwidth / 1e9
    table = Table(
        title=f"One core, reading {bandwidth:.1f} GB/s: a draft step and target passes "
        "(measured, medians)",
        caption="plain: the target's model(...) for the same tokens; beside a draft step, for one",
    )
    headings = ("what", "tokens", "ours ms", "plain ms", "ratio", "weights MB", "GB/s", "floor ms")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for timing in timings:
        table.add_row(
            timing.name, str(timing.num_tokens), f"{timing.ours_ms:.1f}",
            f"{timing.plain_ms:.1f}", f"{timing.ratio:.2f}", f"{timing.weight_bytes / 1e6:.0f}",
            f"{timing.read_gb_per_s:.1f}", f"{timing.floor_ms:.1f}",
        )  # fmt: skip
    console.print(table)
    table = Table(title=f"A window, {costs.num_windows} windows (measured, edge and cloud pinned)")
    for heading in ("cycle", "drafting", "verifying", "overhead outside the models"):
        table.add_column(f"{heading} ms", justify="right")
    table.add_row(
        f"{costs.cycle_ms:.2f}", f"{costs.draft_ms:.2f}", f"{costs.verify_ms:.2f}",
        f"{costs.overhead_ms:.2f}",
    )  # fmt: skip
    console.print(table)
