"""`e2sci up`: the whole system on this machine until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import sys
import zlib
from contextlib import suppress
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from bus.store import WorkerRecord
from cli.group import say
from cli.state import StateFile
from launch.stack import DASHBOARD, GATEWAY, Stack, StackOptions

__all__ = ["relay", "up"]

_COLOURS = ("cyan", "green", "magenta", "blue", "yellow")
_NAME_WIDTH = 10


async def up(options: StackOptions, as_json: bool) -> None:
    """Start everything, say what runs where, and wait to be cancelled; then drain and stop.

    Raises:
        ConfigurationError, StoreUnavailableError: it cannot be started.
    """
    say("starting; the models take a moment to load (the first start also converts the default "
        "target, about 30 s)")  # fmt: skip
    state = StateFile()
    try:
        async with Stack(options, log=relay) as stack:
            state.write(redis_url=stack.redis_url, dashboard_url=stack.dashboard_url)
            await _announce(stack, as_json)
            try:
                await asyncio.Event().wait()
            finally:
                state.remove()
                say("stopping: workers hand back what they have not finished; Ctrl-C again kills")
    finally:
        state.remove()


def relay(line: str) -> None:
    """A child's line on stderr, behind its name."""
    name, _, text = line.partition(" | ")
    colour = _COLOURS[zlib.crc32(name.encode()) % len(_COLOURS)]
    prefix = typer.style(f"{name:<{_NAME_WIDTH}} |", fg=colour)
    with suppress(OSError):  # nobody reads our stderr any more; the workers go on
        typer.echo(f"{prefix} {text}", err=True)


async def _announce(stack: Stack, as_json: bool) -> None:
    records = await stack.records()
    if as_json:
        typer.echo(msgspec.json.encode(_summary(stack, records)))
        sys.stdout.flush()
        return
    console = Console()
    table = Table("process", "pid", "what")
    for process in stack.processes:
        table.add_row(
            process.name,
            str(process.pid),
            _describe(stack, process.name, records.get(process.name)),
        )
    console.print(table)
    if stack.gateway_url is not None:
        console.print(f"OpenAI API: {stack.gateway_url}/v1")
    console.print('ready: e2sci submit "Why is the sky blue?"   e2sci status   Ctrl-C ends it')


def _summary(stack: Stack, records: dict[str, WorkerRecord]) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "redis_url": stack.redis_url,
        "dashboard_url": stack.dashboard_url,
        "gateway_url": stack.gateway_url,
        "processes": {process.name: process.pid for process in stack.processes},
        "workers": {name: msgspec.to_builtins(record) for name, record in records.items()},
    }


def _describe(stack: Stack, name: str, record: WorkerRecord | None) -> str:
    if record is not None:
        model = f"{record.model} ({record.number_format}, {record.device})" if record.model else ""
        return "  ".join([model, *record.endpoints.values()]).strip()
    if name.startswith("link"):
        return f"emulates {stack.options.link} before {name.replace('link', 'cloud')}"
    urls = {DASHBOARD: stack.dashboard_url, GATEWAY: stack.gateway_url}
    return urls.get(name) or stack.redis_url
