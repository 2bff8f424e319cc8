"""What a check has found: a sentence, and what to do about it."""

from __future__ import annotations

from enum import StrEnum

import msgspec

__all__ = ["Check", "Figure", "Status", "failed", "ok", "skipped", "warning"]

Figure = str | int | float | bool | None


class Status(StrEnum):
    """How a check ended. `WARNING`: it works, but slower or less safely than it could. `FAILED`:
    something does not work. `SKIPPED`: it could not be examined."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


class Check(msgspec.Struct, frozen=True):
    """One result.

    Attributes:
        name: of the check, stable for programs; several results may share it.
        sentence: what was found. advice: what to do; empty where nothing needs to be done.
        figures: the numbers in the sentence, for programs; a name ends in its unit.
    """

    name: str
    status: Status
    sentence: str
    advice: str = ""
    figures: dict[str, Figure] = {}


def ok(name: str, sentence: str, **figures: Figure) -> Check:
    """Nothing to do."""
    return Check(name, Status.OK, sentence, figures=figures)


def warning(name: str, sentence: str, advice: str, **figures: Figure) -> Check:
    """It works, but not as well as it could."""
    return Check(name, Status.WARNING, sentence, advice, figures)


def failed(name: str, sentence: str, advice: str, **figures: Figure) -> Check:
    """It does not work."""
    return Check(name, Status.FAILED, sentence, advice, figures)


def skipped(name: str, sentence: str, advice: str = "") -> Check:
    """It could not be examined."""
    return Check(name, Status.SKIPPED, sentence, advice)
