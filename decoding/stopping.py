"""Stop strings over streamed text: what may be shown, and where the answer ends.

Text that could still become a stop string is held back, so a user never sees the beginning of
one. The stop string itself is not part of the answer (OpenAI's and vLLM's convention).
"""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Fed text piece by piece, gives back what is certain.

    Args:
        stops: non-empty strings; may be none.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Text that may be shown now. After a match `matched` is set and nothing more comes."""
        if self.matched:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.matched = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overhang(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        shown, self._held = self._held, ""
        return shown


def _overhang(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
