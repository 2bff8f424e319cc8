"""Logging: one record a line to stderr, as text or as JSON, with time, level and process name.

Prompts and peers' texts reach log messages, so control characters are escaped: a record cannot
forge another one. Tracebacks are folded into the record's line.

A JSON record has `time` (UTC), `level`, `process`, `logger` and `message`, and within
`log_context` also `trace_id`, `request` and `session`, as far as they are known.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

from bus.settings import LogFormat

__all__ = ["configure_logging", "log_context"]

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85, 0x9B, 0x2028, 0x2029)}
_ESCAPES |= {ord("\n"): " ⏎ ", ord("\r"): "\\r", ord("\t"): "    "}
_context: ContextVar[Mapping[str, str]] = ContextVar("log_context")


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).translate(_ESCAPES)


class _Json(JsonFormatter):
    def __init__(self, name: str) -> None:
        super().__init__(
            "%(levelname)s%(name)s%(message)s",
            rename_fields={"levelname": "level", "name": "logger"},
            static_fields={"process": name},
            timestamp="time",
        )


def _add_context(record: logging.LogRecord) -> bool:
    record.__dict__.update(_context.get({}))
    return True


@contextlib.contextmanager
def log_context(traceparent: str = "", request: str = "", session: str = "") -> Iterator[None]:
    """Whom records are about while the block runs, and in tasks that it starts.

    Args:
        traceparent: W3C header value of the request; its trace id is logged.
    """
    trace_id = traceparent.split("-")[1] if traceparent.count("-") == 3 else ""
    fields = {"trace_id": trace_id, "request": request, "session": session}
    token = _context.set({name: value for name, value in fields.items() if value})
    try:
        yield
    finally:
        _context.reset(token)


def configure_logging(level: str, name: str, log_format: LogFormat = "text") -> None:
    """Send all records of at least `level` to stderr as lines of process `name`.

    Calling it again replaces what the call before had set.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_add_context)
    handler.setFormatter(_Json(name) if log_format == "json" else _text(name))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _text(name: str) -> logging.Formatter:
    name = name.replace("%", "%%")
    return _OneLine(
        f"%(asctime)s.%(msecs)03d %(levelname)-7s {name} %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )
