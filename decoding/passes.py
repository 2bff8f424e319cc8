"""One session's pass over its windows, for every shell: worker, tests, explorer and simulator.

    cached row rejects the first token  →  nothing runs
    else: take in the windows that have come meanwhile, run their tokens, collect their rows

A worker may run a pass in pieces, between those of other sessions: rows are the same however a pass
is cut where the engine is bitwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic

from decoding.cloud_events import Event, Forward, PrehitFailed, RowsReady
from decoding.cloud_passes import extended
from decoding.cloud_state import CloudState
from decoding.engine import Cache, Segment, Target, TargetRow, Want


@dataclass(slots=True)
class SessionPass(Generic[Cache]):
    """A pass that has begun.

    Attributes:
        forward: what it runs.
        kept: the cached row that let the first token pass, if one was asked.
        rows: collected so far. num_run: tokens run so far.
        rejected: the cached row has rejected: there is nothing to run.
    """

    cache: Cache
    forward: Forward
    kept: tuple[TargetRow, ...] = ()
    rows: list[TargetRow] = field(default_factory=list)
    num_run: int = 0
    rejected: bool = False

    @property
    def num_left(self) -> int:
        """Tokens that are still to run."""
        return 0 if self.rejected else len(self.forward.feed) - self.num_run

    def segment(self, most: int) -> Segment[Cache]:
        """The next tokens, at most so many."""
        feed, row_ids = self.forward.feed, self.forward.row_ids
        begin, end = self.num_run, min(self.num_run + most, len(feed))
        choices_at = self.forward.choices_at or (None,) * len(row_ids)
        first = len(feed) - len(row_ids)  # the token that the first row follows
        wants = tuple(
            Want(index - begin, row_ids[index - first], choices_at[index - first])
            for index in range(max(begin, first), end)
        )
        return Segment(self.cache, feed[begin:end], wants, continues=bool(self.rows))

    def add(self, segment: Segment[Cache], rows: list[TargetRow]) -> None:
        """The rows of a segment that has run."""
        self.num_run += len(segment.tokens)
        self.rows += rows

    def event(self, verify_ms: float, now_ms: float, share: float = 1.0) -> Event:
        """The event for the session's machine once nothing is left; see `RowsReady`."""
        job = self.forward.job
        if self.rejected:
            return PrehitFailed(job, self.kept[0], now_ms)
        rows = (*self.kept, *self.rows)
        return RowsReady(job, rows, verify_ms, now_ms, self.forward.num_windows, share)


def begin_pass(
    target: Target[Cache], cache: Cache, state: CloudState, forward: Forward
) -> SessionPass[Cache]:
    """Begin a pass now: judge by the cached row, and take in what has come."""
    kept: tuple[TargetRow, ...] = ()
    if forward.prehit is not None:
        prehit = forward.prehit
        kept = (target.row(cache, prehit.index, prehit.want),)
        if not prehit.passes(kept[0]):
            return SessionPass(cache, forward, kept, rejected=True)
    return SessionPass(cache, extended(state, forward), kept)


def run_pass(
    target: Target[Cache], cache: Cache, state: CloudState, forward: Forward
) -> SessionPass[Cache]:
    """A whole pass of one session, in one piece."""
    begun = begin_pass(target, cache, state, forward)
    if begun.num_left:
        segment = begun.segment(begun.num_left)
        begun.add(segment, target.run([segment])[0])
    return begun
