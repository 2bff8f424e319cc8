"""Judges of two versions of a step: is what the draft wrote equivalent to what the target wrote?

Pure functions of the two texts. Knows no tokens and no models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from rapidfuzz import fuzz

LEAST_SIMILARITY = 0.95
"""Of two equivalent steps [the Lookahead Reasoning paper's, for embeddings of the steps]."""

_NUMBER = re.compile(r"\d+")


class Judge(Protocol):
    """Decides whether the drafted version of a step may replace the target's own.

    Attributes:
        name: as usage reports it.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, drafted: str, written: str) -> bool:
        """Whether both texts are equivalent. Pure."""
        ...


@dataclass(frozen=True, slots=True)
class SameText:
    """Equal but for white space and capitals."""

    name: str = "exact match"

    def __call__(self, drafted: str, written: str) -> bool:
        return _normalised(drafted) == _normalised(written)


@dataclass(frozen=True, slots=True)
class Similar:
    """The same numbers in the same order, and normalised texts that are alike.

    Similarity is 1 − d ÷ (m + n), where d is the least number of inserted and deleted characters
    that turn one text of m into the other of n. Without the rule about numbers, which is ours, a
    long step with another result would count as the same.

    Args:
        least: similarity from which on steps are equivalent, 0 … 1.
    """

    least: float = LEAST_SIMILARITY

    @property
    def name(self) -> str:
        return f"similarity of at least {self.least:g}"

    def __call__(self, drafted: str, written: str) -> bool:
        if _NUMBER.findall(drafted) != _NUMBER.findall(written):
            return False
        return fuzz.ratio(_normalised(drafted), _normalised(written)) >= 100.0 * self.least


def _normalised(text: str) -> str:
    return "".join(text.split()).casefold()
