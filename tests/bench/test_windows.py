"""The climb to the best static window."""

from __future__ import annotations

import pytest

from bench.windows import WINDOWS, climb, first_guess


@pytest.mark.parametrize("best", WINDOWS)
@pytest.mark.parametrize("guess", [0.5, 8.0, 40.0])
async def test_the_climb_ends_at_the_fastest_window(best: int, guess: float) -> None:
    tried: list[int] = []

    async def speed(window: int) -> float:
        tried.append(window)
        return 1.0 / (1.0 + abs(WINDOWS.index(window) - WINDOWS.index(best)))

    speeds = await climb(speed, guess)
    assert len(tried) == len(set(tried)) == len(speeds)
    assert max(speeds, key=speeds.__getitem__) == best


def test_a_better_draft_begins_with_longer_windows() -> None:
    assert first_guess(None) < first_guess(0.1) < first_guess(0.05) < first_guess(0.0)
