"""What a draft step and a target pass take alone, and while the other model runs on another core.

Models that share a machine slow each other down, through memory bandwidth and cache. On the two
machines that a bench stands in for they would not, and methods that never run both at once are not
slowed here either. So a comparison on one machine is biased against those that do. Padding every
method to the contended times gives all of them the same device.

Both models run in processes of their own (`bench.contention_child`), the draft on the first core
and the target on the last, as in `bench.cores`. Contended and uncontended samples alternate.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections import defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from bench.child import ChildProcess
from bench.contention_child import DRAFT, MODULE, PASS_SIZES, TARGET, Order
from bench.paced import CONTENDED, Device, fixed_device
from bench.progress import counting_bar
from bus.protocol.errors import ConfigurationError
from engines.padding import LeastTimes

CONTENTION = "contention.json"
REPEATS = 15


class Timing(msgspec.Struct, frozen=True):
    """Median milliseconds, alone and while the other model ran."""

    alone_ms: float
    contended_ms: float

    @property
    def slowdown(self) -> float:
        return self.contended_ms / self.alone_ms


class Contention(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured.

    Attributes:
        step: a draft step, the mean of a window of 8. passes: target passes by their tokens.
        repeats: samples of each median.
    """

    target: str
    draft: str
    dtype: str
    step: Timing
    passes: dict[int, Timing]
    repeats: int

    @property
    def device(self) -> Device:
        """Padded to the contended times."""
        points = tuple(
            (size, round(timing.contended_ms, 1)) for size, timing in sorted(self.passes.items())
        )
        step_ms, passes = round(self.step.contended_ms, 1), LeastTimes(points)
        shown = ", ".join(f"{ms:g} ms over {size}" for size, ms in points)
        name = f"padded to contended times: {step_ms:g} ms a step; passes {shown} tokens"
        return Device(name, step_ms, passes)


def find_devices(
    paced: tuple[str, ...], out: Path, target: str, draft: str, dtype: str
) -> tuple[Device, ...]:
    """The devices of a run, by the names of `bench.paced.split_paced`.

    Contended times are measured once and kept under `out`, so that a run that is resumed goes on
    with the same ones.

    Raises:
        ConfigurationError: a model cannot be loaded, or this machine has a single core.
    """
    devices = []
    for name in paced:
        if name == CONTENDED:
            path = out / CONTENTION
            if not path.exists():
                found = _measured_with_a_bar(target, draft, dtype)
                path.write_bytes(msgspec.json.encode(found))
            devices.append(read_contention(out).device)
        else:
            devices.append(fixed_device(name))
    return tuple(devices)


def read_contention(out: Path) -> Contention:
    """What was measured for a run.

    Raises:
        ConfigurationError: its file cannot be read.
    """
    path = out / CONTENTION
    try:
        return msgspec.json.decode(path.read_bytes(), type=Contention)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); use a new --out") from error


def _measured_with_a_bar(target: str, draft: str, dtype: str) -> Contention:
    with counting_bar() as progress:
        task = progress.add_task("contended times", total=REPEATS + 1)
        return asyncio.run(
            measure_contention(target, draft, dtype, tick=lambda: progress.advance(task))
        )


async def measure_contention(
    target: str, draft: str, dtype: str, repeats: int = REPEATS,
    tick: Callable[[], None] = lambda: None, threads: int = 1,
) -> Contention:  # fmt: skip
    """Time steps and passes; a first round warms up and does not count.

    Args:
        threads: of each model; with more than one, processes run on any core.

    Raises:
        ConfigurationError: a model cannot be loaded, or this machine has a single core.
    """
    if len(os.sched_getaffinity(0)) < 2:
        raise ConfigurationError(
            "contended times need two cores, one for each model; this process may use one"
        )
    async with AsyncExitStack() as exits:
        children = []
        for role, spec in ((DRAFT, draft), (TARGET, target)):
            arguments = ["--role", role, "--model", spec, "--dtype", dtype]
            child = ChildProcess(role, MODULE, [*arguments, "--threads", str(threads)])
            await exits.enter_async_context(child)
            if threads == 1:
                child.pin(last=role == TARGET)
            children.append(child)
        scout, judge = children
        samples: dict[tuple[str, int, bool], list[float]] = defaultdict(list)
        for number in range(repeats + 1):
            taken = [await _round(judge, scout, beside) for beside in (False, True)]
            tick()
            if number:
                for key, ms in [pair for part in taken for pair in part.items()]:
                    samples[key].append(ms)
    return Contention(
        target=target, draft=draft, dtype=dtype, step=_timing(samples, DRAFT, 1),
        passes={size: _timing(samples, TARGET, size) for size in PASS_SIZES}, repeats=repeats,
    )  # fmt: skip


async def _round(
    judge: ChildProcess, scout: ChildProcess, beside: bool
) -> dict[tuple[str, int, bool], float]:
    """One sample of each; beside: while the other model runs without a break."""
    found = {}
    async with AsyncExitStack() as exits:
        if beside:
            await _run_on(scout, exits)
        for size in PASS_SIZES:
            found[TARGET, size, beside] = await judge.ask(Order.TIME, size)
    async with AsyncExitStack() as exits:
        if beside:
            await _run_on(judge, exits)
        found[DRAFT, 1, beside] = await scout.ask(Order.TIME, 1)
    return found


async def _run_on(child: ChildProcess, exits: AsyncExitStack) -> None:
    """Let a model run until the context ends."""
    await child.ask(Order.RUN, 0)
    exits.push_async_callback(child.ask, Order.STOP, 0)


def _timing(samples: dict[tuple[str, int, bool], list[float]], role: str, size: int) -> Timing:
    return Timing(
        statistics.median(samples[role, size, False]), statistics.median(samples[role, size, True])
    )
