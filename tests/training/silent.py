"""A run that shows nothing."""

from __future__ import annotations


class Silent:
    """Shows no progress."""

    def phase(self, name: str) -> None:
        pass

    def advance(self, share: float, tokens: int, loss: float | None = None) -> None:
        pass
