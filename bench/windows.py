"""The best static window of a method in lockstep, found by trying few of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Static windows that may be tried."""
_GUESSED_ERROR_RATE = 0.45
_LEAST_ERROR_RATE = 0.02


def first_guess(error_rate: float | None) -> float:
    """Where to begin, for a draft that is wrong so often; None where that is not known."""
    return 0.8 / (_GUESSED_ERROR_RATE if error_rate is None else max(error_rate, _LEAST_ERROR_RATE))


async def climb(speed: Callable[[int], Awaitable[float]], guess: float) -> dict[int, float]:
    """Tokens a second of all windows tried: from the one nearest to the guess on to the better
    neighbour until there is none. Goodput over W has one maximum (`decoding.pacing`)."""
    at = min(range(len(WINDOWS)), key=lambda index: abs(WINDOWS[index] - guess))
    tried: dict[int, float] = {}
    while True:
        for index in range(max(0, at - 1), min(len(WINDOWS), at + 2)):
            if index not in tried:
                tried[index] = await speed(WINDOWS[index])
        best = max(tried, key=tried.__getitem__)
        if best == at:
            return {WINDOWS[index]: value for index, value in tried.items()}
        at = best
