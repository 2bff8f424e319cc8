"""What `e2sci bench` left: its summary as a data frame. It knows files, not how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

__all__ = ["ALL", "SUMMARY", "family", "frame_of", "read_summary", "runs_under", "whole"]

SUMMARY = "summary.jsonl"
"""A line for each method, data set and setting."""
ALL = "all"
"""`dataset` of the lines over all data sets together."""
_NEEDED = {"method", "dataset", "rtt_ms", "speed.value", "nats_per_token", "mj_per_token"}


def read_summary(path: Path) -> pd.DataFrame:
    """A summary's lines; an interval `speed` becomes `speed.value`, `speed.low`, `speed.high`.

    Raises:
        ValueError: the file is no such summary.
        OSError: it cannot be read.
    """
    return frame_of([json.loads(line) for line in path.read_text("utf-8").splitlines()])


def frame_of(lines: list[dict[str, object]]) -> pd.DataFrame:
    """The same from lines that have been read."""
    frame = pd.json_normalize(lines)
    missing = _NEEDED - set(frame.columns)
    if missing:
        raise ValueError(
            f"this is no summary of e2sci bench: it lacks {', '.join(sorted(missing))}"
        )
    for name in ("over_target", "over_sd"):  # None where the other was not measured
        for part in ("value", "low", "high"):
            column = f"{name}.{part}"
            if column not in frame:
                frame[column] = float("nan")
    return frame.assign(family=[family(name) for name in frame["method"]])


def family(method: str) -> str:
    """A method's name without its parameters."""
    return method.partition(":")[0]


def whole(frame: pd.DataFrame) -> pd.DataFrame:
    """The lines over all data sets together, or those of the only one."""
    alls = frame[frame["dataset"] == ALL]
    return frame if alls.empty else alls


def runs_under(folder: Path) -> list[Path]:
    """Directories below a folder that hold a summary, the newest first."""
    found = folder.glob(f"**/{SUMMARY}") if folder.is_dir() else ()
    return [p.parent for p in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]
