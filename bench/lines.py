"""JSON Lines that survive being killed: a half-written last line is passed over, never joined."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

_T = TypeVar("_T")


def append_rows(path: Path, rows: Sequence[msgspec.Struct]) -> None:
    """Add rows after the last whole line, on disk when this returns."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(msgspec.json.Encoder().encode_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def read_all(path: Path, kind: type[_T]) -> list[_T]:
    """Rows of a file, oldest first; none where there is none. Lines that are no such row, as a run
    that was killed leaves one, do not count."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(msgspec.json.decode(line, type=kind))
        except msgspec.DecodeError:
            continue
    return rows
