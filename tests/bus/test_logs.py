"""A log record is one line, whatever is in it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from bus.runtime.logs import configure_logging, log_context


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_one_line_with_time_level_and_name(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "edge-1%s")
    log = logging.getLogger("edge_worker.shell")
    log.debug("not shown")
    log.info("prompt %r came", "x")
    log.warning("forged\n2026-01-01T00:00:00 ERROR cloud-1: nothing\r\x1b[31m")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("broken")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}"
    assert re.fullmatch(rf"{stamp} INFO    edge-1%s edge_worker\.shell: prompt 'x' came", lines[0])
    assert r"\r\x1b[31m" in lines[1]
    assert "ValueError: first ⏎ second" in lines[2]


def test_json_lines_say_whom_they_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "edge-1", "json")
    log = logging.getLogger("edge_worker.shell")
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    with log_context(traceparent, request="r1", session="s1"):
        log.info("%d tokens\nforged\u2028", 3)
    log.warning("of none")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("broken")
    about, none, broken = map(json.loads, capsys.readouterr().err.splitlines())
    assert datetime.fromisoformat(about.pop("time")).tzinfo is UTC
    assert about == {
        "level": "INFO", "process": "edge-1", "logger": "edge_worker.shell",
        "message": "3 tokens\nforged\u2028", "trace_id": "a" * 32, "request": "r1",
        "session": "s1",
    }  # fmt: skip
    assert set(none) == {"time", "level", "process", "logger", "message"}
    assert "ValueError: first\nsecond" in broken["exc_info"]


async def test_tasks_that_begin_in_a_context_keep_it(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "edge-1", "json")

    async def later() -> None:
        await asyncio.sleep(0)
        logging.getLogger("x").info("later")

    with log_context(request="r1"):
        task = asyncio.create_task(later())
    await task
    assert json.loads(capsys.readouterr().err)["request"] == "r1"
