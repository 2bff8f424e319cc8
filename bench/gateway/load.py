"""Many streams at once through the gateway, for minutes: what is lost, what grows, what waits.

*Measured*: every stream asks for one of a few prompts, greedy, whose answer was read from the queue
before: a stream that gets another text has been mixed up. Memory is each process's resident set,
sampled every second; the first third of the run is its warm-up.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2
import msgspec
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis
from scipy.stats import linregress

from bench.gateway.streams import GatewayError, stream
from bus.settings import BusSettings
from bus.store import Keys
from launch.stack import Stack

LAG = "e2sci:event_loop_lag_seconds"
_SAMPLE_S = 1.0
_POLL_S = 0.02
_LEAVER, _STAYER = "leaver-", "stayer-"
_LONG = 2_000
"""Tokens of a stream that is cut off: it cannot have ended by itself."""


class Memory(msgspec.Struct, frozen=True):
    """Of one process after the warm-up: megabytes at its beginning and end, and its growth a minute
    by least squares."""

    begin_mb: float
    end_mb: float
    growth_mb_per_min: float


class Load(msgspec.Struct, frozen=True):
    """What a run came to.

    Attributes:
        busy: answers with 429. lost: streams that ended without their end. mixed_up: with another
            text than their prompt's. errors: what else went wrong, and how often.
        lag_p99_ms: of each process's event loop, the upper bound of the histogram's bucket.
    """

    streams: int
    seconds: float
    answers: int
    tokens_per_s: float
    busy: int
    lost: int
    mixed_up: int
    errors: dict[str, int]
    lag_p99_ms: dict[str, float]
    memory: dict[str, Memory]


@dataclass
class _Counts:
    answers: int = 0
    tokens: int = 0
    busy: int = 0
    lost: int = 0
    mixed_up: int = 0
    errors: Counter[str] = field(default_factory=Counter)


async def under_load(
    stack: Stack,
    http: httpx2.AsyncClient,
    expected: dict[str, str],
    streams: int,
    seconds: float,
    max_tokens: int,
    tick: Callable[[float], None],
) -> Load:
    """Keep so many streams open for a time.

    Args:
        expected: prompt → its answer of `max_tokens` tokens.
        tick: takes the seconds that have passed since its last call.
    """
    counts, began = _Counts(), time.perf_counter()
    samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
    prompts = list(expected.items())

    async def one(number: int) -> None:
        while time.perf_counter() - began < seconds:
            prompt, text = prompts[number % len(prompts)]
            await _one_answer(http, prompt, text, max_tokens, counts)
            number += streams

    running = [asyncio.create_task(one(number)) for number in range(streams)]
    while not all(task.done() for task in running):
        await asyncio.sleep(_SAMPLE_S)
        tick(_SAMPLE_S)
        passed = time.perf_counter() - began
        if passed <= seconds:
            for name, size in resident_mb(stack).items():
                samples[name].append((passed, size))
    took_s = time.perf_counter() - began
    for task in running:
        task.result()
    return Load(
        streams=streams,
        seconds=took_s,
        answers=counts.answers,
        tokens_per_s=counts.tokens / took_s,
        busy=counts.busy,
        lost=counts.lost,
        mixed_up=counts.mixed_up,
        errors=dict(counts.errors),
        lag_p99_ms=await loop_lags(stack),
        memory={name: _growth(found) for name, found in samples.items()},
    )


async def _one_answer(
    http: httpx2.AsyncClient, prompt: str, text: str, max_tokens: int, counts: _Counts
) -> None:
    try:
        got = await stream(http, prompt, max_tokens)
    except (GatewayError, httpx2.HTTPError) as error:
        counts.errors[str(error)[:200] or type(error).__name__] += 1
        await asyncio.sleep(0.1)
        return
    if got.busy:
        counts.busy += 1
        await asyncio.sleep(0.1)
        return
    counts.answers += 1
    counts.tokens += got.num_tokens
    counts.lost += not got.finish_reason
    counts.mixed_up += got.text != text


def resident_mb(stack: Stack) -> dict[str, float]:
    """Megabytes of each process that runs."""
    found = {}
    for process in stack.processes:
        with suppress(psutil.NoSuchProcess):
            if process.running:
                found[process.name] = psutil.Process(process.pid).memory_info().rss / 1e6
    return found


def _growth(samples: Sequence[tuple[float, float]]) -> Memory:
    """Of (seconds, megabytes), the first third left out."""
    rest = np.array(samples[len(samples) // 3 :])
    if len(rest) < 2:
        return Memory(rest[0, 1], rest[-1, 1], float("nan"))
    slope = linregress(rest[:, 0], rest[:, 1]).slope
    return Memory(float(rest[0, 1]), float(rest[-1, 1]), float(60 * slope))


async def loop_lags(stack: Stack) -> dict[str, float]:
    """Process → 99 % of its event loop's lags were below, in milliseconds."""
    found = {}
    async with httpx2.AsyncClient() as http:
        for name, url in (await stack.metrics_urls()).items():
            text = (await http.get(url)).text
            lag = _p99_ms(text)
            if lag is not None:
                found[name] = lag
    return found


def _p99_ms(metrics: str) -> float | None:
    """None where there is no such histogram, or nothing in it."""
    for family in text_string_to_metric_families(metrics):
        if family.name != LAG:
            continue
        buckets = [
            (float(sample.labels["le"]), sample.value)
            for sample in family.samples
            if sample.name.endswith("_bucket")
        ]
        if buckets and (total := buckets[-1][1]):
            return 1e3 * next(bound for bound, count in buckets if count >= 0.99 * total)
    return None


# --- readers that leave -------------------------------------------------------------------------


class Disconnected(msgspec.Struct, frozen=True):
    """Of `streams` running ones so many left: seconds until the queue held none of theirs, and
    those that stayed and went on."""

    streams: int
    left: int
    freed_s: float
    stayed: int


async def disconnecting(
    redis: Redis, http: httpx2.AsyncClient, streams: int, leaving: int, limit_s: float = 30.0
) -> Disconnected:
    """Open streams, close some at once, and see how long the queue holds their requests.

    Raises:
        GatewayError: it still holds one after `limit_s`.
    """
    names = [f"{_LEAVER if number < leaving else _STAYER}{number}" for number in range(streams)]
    tasks = [
        asyncio.create_task(stream(http, "Count to a thousand.", _LONG, user=name))
        for name in names
    ]
    await _until(lambda: _held(redis, _LEAVER, _STAYER), streams, limit_s)
    began = time.perf_counter()
    for task in tasks[:leaving]:
        task.cancel()
    await asyncio.wait(tasks[:leaving])
    await _until(lambda: _held(redis, _LEAVER), 0, limit_s)
    freed_s = time.perf_counter() - began
    stayed = await _held(redis, _STAYER)
    for task in tasks[leaving:]:
        task.cancel()
    await asyncio.wait(tasks[leaving:])
    await _until(lambda: _held(redis, _STAYER), 0, limit_s)
    return Disconnected(streams, leaving, freed_s, stayed)


async def _held(redis: Redis, *prefixes: str) -> int:
    """Requests in the queue, waiting or running, of clients of these names."""
    prompts = Keys(BusSettings.load().key_prefix).prompts
    entries: list[Any] = await redis.xrange(prompts)  # type: ignore[assignment]
    clients = [fields.get(b"client", b"").decode() for _, fields in entries]
    return sum(name.startswith(prefixes) for name in clients)


async def _until(count: Callable[[], Awaitable[int]], expected: int, limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            while await count() != expected:  # noqa: ASYNC110 - no event says so
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise GatewayError(
            f"the queue holds {await count()} requests after {limit_s:g} s; expected {expected}"
        ) from None
