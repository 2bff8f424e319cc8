"""A log record is one line, whatever is in it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from bus.runtime.logs import configure_logging


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
