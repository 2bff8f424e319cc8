"""Who was refused for want of a place, and who gets the next one.

A refused edge asks again after a pause of its own. A place that is freed meanwhile is kept for the
session that has waited longest, so that sessions are served in the order in which they first asked,
whichever edges they come from. One that has not asked again for `patience_ms` is forgotten.
"""

from __future__ import annotations

PATIENCE_MS = 6000.0
"""Three times the longest pause of an edge (`decoding.timing`)."""
MOST_WAITING = 1024
"""Sessions that are remembered; beyond, a session waits without a place in the row."""


class WaitingRoom:
    """Sessions by id, in the order in which they first asked."""

    def __init__(self, patience_ms: float = PATIENCE_MS) -> None:
        self._patience_ms = patience_ms
        self._asked_ms: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._asked_ms)

    def admit(self, session: str, num_free: int, now_ms: float) -> bool:
        """Whether `session` may have one of `num_free` places; where not, it waits in the row."""
        for name, asked_ms in list(self._asked_ms.items()):
            if asked_ms < now_ms - self._patience_ms:
                del self._asked_ms[name]
        row = list(self._asked_ms)
        ahead = row.index(session) if session in self._asked_ms else len(row)
        if ahead < num_free:
            self._asked_ms.pop(session, None)
            return True
        if session in self._asked_ms or len(row) < MOST_WAITING:
            self._asked_ms[session] = now_ms
        return False

    def leave(self, session: str) -> None:
        """It does not want a place any more."""
        self._asked_ms.pop(session, None)
