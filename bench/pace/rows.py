"""What is kept of each answer: one JSON object a line, so that a run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from bench.lines import append_rows
from bus.protocol.errors import ConfigurationError
from bus.store import TimelineEntry, Usage

ALONE = "target alone"
NO_DRAFT = "none"
"""Draft of the rows that were measured once for all settings."""

_T = TypeVar("_T")


class PaceRow(msgspec.Struct, frozen=True):
    """One answer, measured.

    Attributes:
        method: `sd:W`, another method, or `target alone`.
        error_rate: of an oracle on top of the draft; None is the draft itself.
        repeat: −1 for the sweep of windows.
        tokens: that came after the first target pass, which takes in all that was drafted while
            the prompt ran. seconds: from that pass's feedback to the last one.
        usage: of the whole answer; None for the target alone.
    """

    draft: str
    error_rate: float | None
    rtt_ms: float
    method: str
    repeat: int
    prompt_id: int
    tokens: int
    seconds: float
    usage: Usage | None = None
    source: str = "measured"

    @property
    def in_sweep(self) -> bool:
        return self.repeat < 0


def tokens_per_s(rows: Sequence[PaceRow]) -> float:
    """Of all these answers together; 0 where each came in one pass."""
    return sum(row.tokens for row in rows) / max(sum(row.seconds for row in rows), 1e-9)


def whole_tokens_per_s(rows: Sequence[PaceRow]) -> float:
    """The same over whole answers, the prompt's time included; only for those with `usage`."""
    usages = [row.usage for row in rows if row.usage is not None]
    seconds = sum(usage.seconds for usage in usages)
    return sum(usage.completion_tokens for usage in usages) / max(seconds, 1e-9)


class StackRow(msgspec.Struct, frozen=True):
    """What one draft over one link was like; times in ms.

    Attributes:
        step_ms: a draft step in lockstep, median.
        late_median_ms, late_p99_ms, late_max_ms: how late the link was.
        models_last: link, Redis, controller and client went before the models on their cores.
    """

    draft: str
    error_rate: float | None
    rtt_ms: float
    step_ms: float
    late_median_ms: float | None
    late_p99_ms: float | None
    late_max_ms: float | None
    models_last: bool
    source: str = "measured"


class TimelineRow(msgspec.Struct, frozen=True):
    """One session's timeline, and where it was measured."""

    draft: str
    error_rate: float | None
    rtt_ms: float
    timeline: TimelineEntry


def rewrite(path: Path, rows: Sequence[msgspec.Struct]) -> None:
    """Replace a file's rows, or leave it as it was."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    append_rows(new, rows)
    new.replace(path)


def read_rows(path: Path) -> list[PaceRow]:
    """Rows of an earlier run; none where there is no file.

    Raises:
        ConfigurationError: it is no such file.
    """
    return _read(path, PaceRow)


def read_stack_rows(path: Path) -> list[StackRow]:
    """As `read_rows`, of the stacks."""
    return _read(path, StackRow)


def read_timeline_rows(path: Path) -> list[TimelineRow]:
    """As `read_rows`, of the timelines."""
    return _read(path, TimelineRow)


def _read(path: Path, kind: type[_T]) -> list[_T]:
    if not path.exists():
        return []
    try:
        return msgspec.json.Decoder(kind).decode_lines(path.read_bytes())
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{path} is damaged ({error}); use a new --out") from error
