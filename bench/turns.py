"""Who answers first: methods take turns, so that what drifts hits all alike."""

from __future__ import annotations

from collections.abc import Sequence


def in_turn(names: Sequence[str], number: int) -> tuple[str, ...]:
    """The order in which methods answer a prompt: who begins changes with its number."""
    shift = number % len(names)
    return (*names[shift:], *names[:shift])
