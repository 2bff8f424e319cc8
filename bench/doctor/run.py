"""All checks in order: this machine, the installation, the running system, the speed to expect."""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from rich.progress import Progress

from bench.doctor import machine, system
from bench.doctor.checks import Check, Status, failed, skipped, warning
from bench.doctor.expect import (
    USUAL_RTT_MS,
    Expectation,
    PairCosts,
    Way,
    check_expectation,
    costs_of,
    num_predictions,
    predict_all,
)
from bench.doctor.models import check_models
from bench.doctor.network import LinkFigures, check_links
from bench.doctor.report import Report
from bench.doctor.settings import (
    check_keys,
    check_ports,
    check_redis_access,
    check_settings,
    configured_ports,
)
from bench.doctor.system import System, read_system
from bench.progress import counting_bar
from bench.simulate.device import Device
from bus.protocol.errors import ConfigurationError, ModelError, StoreUnavailableError
from bus.runtime.worker import WorkerSettings
from bus.settings import BusSettings
from bus.store import Role, WindowEntry, WorkerRecord
from bus.transport.sockets import is_loopback
from engines.catalog.registry import Specs
from launch.embedded import binary_problem
from launch.stack import DEFAULT_DASHBOARD_PORT, DEFAULT_GATEWAY_PORT


@dataclass(frozen=True, slots=True)
class Question:
    """What to examine.

    Attributes:
        specs: the pair. dtype: its number format.
        settings: with the Redis to use; None where none is configured and nothing runs.
        stack_here: whether an `e2sci up` runs on this machine.
        quick: load no models, send no large messages, compute no digests of model files.
    """

    specs: Specs
    dtype: str = "auto"
    settings: BusSettings | None = None
    stack_here: bool = False
    quick: bool = False


async def examine(question: Question) -> Report:
    """Run every check; what one of them cannot do is a failed check, not an error."""
    checks = list(_machine_checks(question))
    usable = not any(c.status is Status.FAILED for c in checks if c.name in ("target", "draft"))
    configured = check_settings()
    checks.append(configured)
    found, more = await _system_checks(question)
    links = tuple[LinkFigures, ...]()
    if configured.status is not Status.FAILED:
        checks += _settings_checks(question, found)
    checks += more
    if found is not None and question.settings is not None and found.live:
        from_here, measured = await check_links(
            question.settings, found.live, bandwidth=not question.quick
        )
        checks += from_here
        links = tuple(measured)
    expectation = None
    with nullcontext() if question.quick else counting_bar() as bar:
        costs, more = await _costs(question, found, usable, bar)
        checks += more
        if costs is not None:
            expectation = _expect(costs, _ways(found, links), bar)
            checks += check_expectation(expectation)
    return Report(tuple(checks), links, expectation)


def _machine_checks(question: Question) -> Sequence[Check]:
    limits = machine.read_limits()
    load = None if question.stack_here else os.getloadavg()[0]  # its workers are no strangers
    models, model_bytes = check_models(question.specs, whole=not question.quick)
    return (
        machine.check_python(),
        *machine.check_packages(machine.read_pins()),
        machine.check_processor(machine.read_processor()),
        *machine.check_cores(limits, load),
        machine.check_memory(limits, model_bytes),
        machine.check_cache(),
        *models,
    )


def _settings_checks(question: Question, found: System | None) -> Sequence[Check]:
    settings = WorkerSettings.load()
    running = question.stack_here or (found is not None and bool(found.live))
    ports = (
        [skipped("ports", "A system runs; its ports are in use by itself.")]
        if running
        else check_ports(
            configured_ports(),
            [(DEFAULT_DASHBOARD_PORT, "dashboard"), (DEFAULT_GATEWAY_PORT, "gateway")],
        )
    )
    redis = [] if question.settings is None else [check_redis_access(question.settings)]
    return (*ports, check_keys(settings), *redis)


async def _system_checks(question: Question) -> tuple[System | None, list[Check]]:
    """What Redis holds, where one answers."""
    if question.settings is None:
        return None, [_no_redis()]
    try:
        found = await read_system(question.settings)
    except (StoreUnavailableError, ConfigurationError) as error:
        return None, [system.unreachable(error)]
    has_edge = any(record.role is Role.EDGE for record in found.live)
    return found, [
        *system.check_redis(found.info, found.latency_ms),
        *system.check_queue(
            found.overview.queue, found.has_group, has_edge, question.settings.max_queue
        ),
        *system.check_clocks(found),
        *system.check_workers(found),
    ]


def _no_redis() -> Check:
    problem = binary_problem()
    if problem:
        return failed("redis", f"No Redis is configured, and the embedded Valkey cannot run: "
                      f"{problem}.", "Run a Redis 7 and set E2SCI_REDIS_URL.")  # fmt: skip
    return skipped("redis", "No Redis is configured and no system runs here; `e2sci up` starts an "
                   "embedded Valkey.")  # fmt: skip


# --- the speed to expect ----------------------------------------------------------------------


async def _costs(
    question: Question, found: System | None, usable: bool, bar: Progress | None
) -> tuple[PairCosts | None, list[Check]]:
    """From the running system, where it has answered enough, else measured here."""
    if found is not None:
        windows = [e for _, e in found.telemetry if isinstance(e, WindowEntry)]
        if (costs := costs_of(windows)) is not None:
            return costs, []
    if bar is None:
        return None, [skipped("speed", "The speed is not predicted: no system runs that has "
                              "answered enough.", "Run the doctor without --quick.")]  # fmt: skip
    if not usable:
        return None, [skipped("speed", "The speed is not predicted: a model is missing.")]
    try:
        return await _measured_here(question, bar)
    except (ModelError, ConfigurationError) as error:
        return None, [failed("models", f"The pair cannot be measured: {error}.",
                             "Choose another --pair, --draft or --dtype.")]  # fmt: skip


async def _measured_here(
    question: Question, bar: Progress
) -> tuple[PairCosts | None, list[Check]]:  # fmt: skip
    from bench.doctor import measure  # noqa: PLC0415 - loads torch

    tick = _ticks(bar, "measuring draft and target", measure.num_ticks())
    device: Device | None = None
    if measure.has_two_cores():
        device = await measure.measure_times(question.specs, question.dtype, tick)
    pair = await asyncio.to_thread(measure.Pair, question.specs, question.dtype)
    fits = pair.check()
    if fits.status is Status.FAILED:
        return None, [fits]
    try:
        if device is None:
            device = await asyncio.to_thread(pair.times_here, tick)
        hits = await asyncio.to_thread(pair.hits, tick)
    finally:
        pair.stopping.set()
    if not hits:
        return None, [fits, warning("speed", "The target's answers are empty; the speed is not "
                                    "predicted.", "Choose another target.")]  # fmt: skip
    return measure.costs_here(question.specs, device, hits), [fits]


def _ways(found: System | None, links: Sequence[LinkFigures]) -> list[Way]:
    """The measured round trip, or none, and the usual one between two machines."""
    clouds = [link for link in links if link.role is Role.CLOUD]
    if not clouds or found is None:
        return [Way(0.0, "none", shared=True), Way(USUAL_RTT_MS, "assumed", shared=False)]
    near = {record.worker_id for record in found.live if _is_here(record)}
    rtt_ms = statistics.median(link.rtt_ms for link in clouds)
    shared = all(link.worker in near for link in clouds)
    return [Way(rtt_ms, "measured", shared), Way(USUAL_RTT_MS, "assumed", shared=False)]


def _is_here(record: WorkerRecord) -> bool:
    """Whether the worker is reached on loopback, so that it shares this machine."""
    return is_loopback(record.endpoints.get("windows", ""))


def _expect(costs: PairCosts, ways: list[Way], bar: Progress | None) -> Expectation:
    if bar is None:
        return predict_all(costs, ways)
    return predict_all(costs, ways, _ticks(bar, "predicting", num_predictions(ways)))


def _ticks(bar: Progress, name: str, total: int) -> Callable[[], None]:
    task = bar.add_task(name, total=total)
    return lambda: bar.advance(task)
