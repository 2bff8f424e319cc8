"""`e2sci bench timeline`: one session on real processes, drawn as `dashboard.timeline_chart`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from bench.answers import read_answer
from bench.cores import pin
from bench.pace.rows import TimelineRow
from bench.telemetry import read_telemetry
from bus.client import Client
from bus.protocol.errors import ConfigurationError, RequestFailedError
from bus.store import TimelineEntry
from dashboard.timeline_chart import timeline_figure
from launch.stack import Stack, StackOptions

WARM_UP = "Give me three tips for learning a new language."
FORMATS = (".html", ".svg", ".png")
_WIDTH_PX = 1000
_POLL_S, _POLLS = 0.1, 50


def checked_out(out: Path) -> Path:
    """Before anything is started.

    Raises:
        ConfigurationError: the file's name does not say a format that can be drawn.
    """
    if out.suffix not in FORMATS:
        raise ConfigurationError(f"{out}: the name must end in one of {', '.join(FORMATS)}")
    return out


async def record(
    stack: StackOptions, prompt: str, method: str, max_new_tokens: int
) -> TimelineEntry:
    """Answer one prompt on a stack of its own, edge and cloud on one core each; its timeline.

    Another prompt goes before, so that pace and processes are warm.

    Raises:
        RequestFailedError: the answer ended with an error, or left no timeline.
    """
    running = Stack(stack, log=lambda _: None, quiet=True, env={"E2SCI_TIMELINE": "1"})
    options: dict[str, Any] = {
        "method": method, "temperature": 0.0, "max_new_tokens": max_new_tokens, "seed": 0,
    }  # fmt: skip
    async with running:
        pin(running)
        async with Client(redis_url=running.redis_url) as client:
            await read_answer(client, WARM_UP, **options)
            await read_answer(client, prompt, **options)
        return await _newest(running.redis_url, expected=2)


async def _newest(redis_url: str, expected: int) -> TimelineEntry:
    """The last timeline once `expected` of them are there: it is told a moment after the end."""
    for _ in range(_POLLS):
        entries = await read_telemetry(redis_url)
        timelines = [entry for entry in entries if isinstance(entry, TimelineEntry)]
        if len(timelines) >= expected:
            return timelines[-1]
        await asyncio.sleep(_POLL_S)
    raise RequestFailedError("the edge has told no timeline of this answer")


def read_timeline(path: Path) -> TimelineEntry:
    """The last timeline of a file with one a line, as `--keep` and `bench pace` write them.

    Raises:
        ConfigurationError: it cannot be read or holds none.
    """
    try:
        lines = path.read_bytes().splitlines()
        if not lines:
            raise ConfigurationError(f"{path} holds no timelines: it is empty")
        if msgspec.json.decode(lines[-1], type=dict).get("timeline"):
            return msgspec.json.decode(lines[-1], type=TimelineRow).timeline
        return msgspec.json.decode(lines[-1], type=TimelineEntry)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"{path} holds no timelines: {error}") from None


def keep_timeline(path: Path, entry: TimelineEntry) -> None:
    """Write one timeline, for `read_timeline`."""
    path.write_bytes(msgspec.json.encode(entry) + b"\n")


def draw(entry: TimelineEntry, out: Path) -> None:
    """Write the figure; what of it depends on the file's name.

    Raises:
        ConfigurationError: an image was asked for, and there is nothing here to make one with.
    """
    figure = timeline_figure(entry)
    if out.suffix == ".html":
        figure.write_html(out, include_plotlyjs=True)
        return
    try:
        figure.write_image(out, width=_WIDTH_PX)
    except RuntimeError as error:
        raise ConfigurationError(
            f"{out}: an image needs the package kaleido and a Chromium or Chrome, and one of them "
            "is missing here; install it, or let the name end in .html"
        ) from error
