"""Runs both measurements on a stack of its own and prints what they came to."""

from __future__ import annotations

import asyncio

import msgspec
from httpx2 import AsyncClient
from redis.asyncio import Redis
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.gateway.load import Disconnected, Load, disconnecting, under_load
from bench.gateway.overhead import Overhead, pair_of_answers, summarized
from bench.gateway.streams import client as http_client
from bench.progress import counting_bar
from bench.prompts import PROMPTS
from bus.client import Client
from bus.protocol.errors import LocalError
from launch.stack import Stack, StackOptions

_FIRST_PORT = 18_000
_WARM_UP = 3


class Setting(msgspec.Struct, frozen=True):
    """What to measure: pairs of answers; streams, for how long; how many of them leave."""

    answers: int
    max_tokens: int
    streams: int
    seconds: float
    load_tokens: int
    leaving: int
    dtype: str


class Result(msgspec.Struct, frozen=True):
    """None where it was not asked for."""

    overhead: Overhead | None
    load: Load | None
    disconnected: Disconnected | None


def run(setting: Setting, as_json: bool) -> None:
    """Measure and print: tables for people, one JSON object on one line for programs."""
    with counting_bar() as bar:
        result = asyncio.run(measure(setting, bar))
    if as_json:
        print(msgspec.json.encode(result).decode())
    else:
        _show(result)


async def measure(setting: Setting, bar: Progress) -> Result:
    """All that the setting asks for, on one stack."""
    options = StackOptions(dtype=setting.dtype, gateway_port=_FIRST_PORT)
    async with Stack(options, log=lambda _: None) as stack:
        url = stack.gateway_url
        if url is None:
            raise LocalError("the stack has no gateway")
        async with Client(redis_url=stack.redis_url) as client, http_client(url) as http:
            return Result(
                await _overhead(client, http, setting, bar) if setting.answers else None,
                await _load(stack, client, http, setting, bar) if setting.streams else None,
                await _disconnected(stack, http, setting) if setting.leaving else None,
            )


async def _overhead(client: Client, http: AsyncClient, setting: Setting, bar: Progress) -> Overhead:
    """The first answers warm both doors up."""
    task = bar.add_task("pairs of answers", total=setting.answers)
    pairs = []
    for number in range(setting.answers + _WARM_UP):
        prompt, http_first = PROMPTS[number % len(PROMPTS)], number % 2 == 1
        pairs.append(await pair_of_answers(client, http, prompt, setting.max_tokens, http_first))
        bar.update(task, completed=max(0, number + 1 - _WARM_UP))
    return summarized(pairs[_WARM_UP:])


async def _load(
    stack: Stack, client: Client, http: AsyncClient, setting: Setting, bar: Progress
) -> Load:
    expected = {
        prompt: (await client.generate(prompt, max_new_tokens=setting.load_tokens)).text
        for prompt in PROMPTS
    }
    task = bar.add_task("seconds under load", total=setting.seconds)
    return await under_load(
        stack, http, expected, setting.streams, setting.seconds, setting.load_tokens,
        lambda passed: bar.advance(task, passed),
    )  # fmt: skip


async def _disconnected(stack: Stack, http: AsyncClient, setting: Setting) -> Disconnected:
    async with Redis.from_url(stack.redis_url) as redis:
        streams = max(setting.streams, setting.leaving)
        return await disconnecting(redis, http, streams, setting.leaving)


def _show(result: Result) -> None:
    console = Console()
    if result.overhead is not None:
        _show_overhead(console, result.overhead)
    if result.load is not None:
        _show_load(console, result.load)
    if result.disconnected is not None:
        left = result.disconnected
        console.print(
            f"{left.left} of {left.streams} streams disconnected: the queue held none of theirs "
            f"after {left.freed_s:.2f} s; {left.stayed} went on (measured)"
        )


def _show_overhead(console: Console, found: Overhead) -> None:
    table = Table(
        title=f"HTTP against the raw queue, {found.answers} pairs, alternated (measured)",
        caption=f"{found.same_text} with the same text; {found.num_pieces} pieces read by both",
    )
    for heading in ("medians", "queue ms", "HTTP ms", "HTTP − queue ms"):
        table.add_column(heading, justify="left" if heading == "medians" else "right")
    table.add_row("first piece", f"{found.queue_first_ms:.1f}", f"{found.http_first_ms:.1f}",
                  str(found.first_ms))  # fmt: skip
    table.add_row("a token after it", f"{found.queue_token_ms:.2f}", f"{found.http_token_ms:.2f}",
                  str(found.token_ms))  # fmt: skip
    table.add_row("a piece of the same answer", "", "",
                  f"{found.piece_ms:.2f}, 99 % below {found.piece_p99_ms:.2f}")  # fmt: skip
    console.print(table)


def _show_load(console: Console, load: Load) -> None:
    console.print(
        f"{load.streams} streams for {load.seconds:.0f} s: {load.answers} answers, "
        f"{load.tokens_per_s:.0f} tokens/s, {load.busy} × 429, {load.lost} lost, "
        f"{load.mixed_up} mixed up, errors {load.errors or 'none'} (measured)"
    )
    table = Table(title="Processes under load")
    for heading in ("process", "MB then", "MB at the end", "MB/min", "loop lag p99 ms"):
        table.add_column(heading, justify="left" if heading == "process" else "right")
    for name, memory in load.memory.items():
        lag = load.lag_p99_ms.get(name)
        table.add_row(
            name, f"{memory.begin_mb:.0f}", f"{memory.end_mb:.0f}",
            f"{memory.growth_mb_per_min:+.1f}", "" if lag is None else f"≤ {lag:.0f}",
        )  # fmt: skip
    console.print(table)
