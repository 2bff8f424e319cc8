"""Logging: one line per record to stderr, with time, level and process name.

Prompts and peers' texts reach log messages, so control characters are escaped: a record cannot
forge another one. Tracebacks are folded into the record's line.
"""

from __future__ import annotations

import logging
import sys

__all__ = ["configure_logging"]

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85, 0x9B, 0x2028, 0x2029)}
_ESCAPES |= {ord("\n"): " ⏎ ", ord("\r"): "\\r", ord("\t"): "    "}


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).translate(_ESCAPES)


def configure_logging(level: str, name: str) -> None:
    """Send all records of at least `level` to stderr as lines of process `name`.

    Calling it again replaces what the call before had set.
    """
    handler = logging.StreamHandler(sys.stderr)
    name = name.replace("%", "%%")
    handler.setFormatter(
        _OneLine(
            f"%(asctime)s.%(msecs)03d %(levelname)-7s {name} %(name)s: %(message)s",
            datefmt="%Y-%m-%dT%H:%M:%S",
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
