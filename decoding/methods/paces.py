"""Paces: lockstep drafts one window and waits for its feedback."""

from __future__ import annotations


class Lockstep:
    """One window in flight.

    At temperature 0 the window holds W tokens and a full acceptance commits the target's next
    token as a bonus. Above, a bonus token would depend on where windows end, so W + 1 tokens are
    drafted instead, the target still runs W of them (plus what it has not run yet), and the last
    one is judged like any other: the same cost, and the text depends on seed and prompt only
    (DESIGN rule 3).
    """

    name = "lockstep"

    def num_to_draft(self, window: int, greedy: bool, num_in_flight: int) -> int:
        if num_in_flight:
            return 0
        return window if greedy else window + 1

    def commits_bonus(self, greedy: bool) -> bool:
        return greedy
