"""One session's pass, for every shell: worker, tests, explorer and simulator.

    plan what to run, by the windows that have come until now
    kept row rejects the first token  →  nothing runs
    no window, but a speculator       →  run the last token and the tree that it proposes
    else: run the tokens, collect their rows

A worker may run a pass in pieces, between those of other sessions: rows are the same however a pass
is cut where the engine is bitwise. One with a tree runs whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic

from decoding.cloud_events import Event, Forward, Prefill, PrehitFailed, RowsReady
from decoding.cloud_passes import plan
from decoding.cloud_state import CloudState
from decoding.cloud_trees import planned
from decoding.engine import Cache, Segment, Target, TargetRow, Want
from decoding.verification import Plan


@dataclass(slots=True)
class SessionPass(Generic[Cache]):
    """A pass that has begun.

    Attributes:
        job: which it answers. plan: what it runs.
        kept: the cached row that let the first token pass, if one was asked.
        rows: collected so far. num_run: tokens run so far.
        rejected: the cached row has rejected: there is nothing to run.
    """

    cache: Cache
    job: int
    plan: Plan
    kept: tuple[TargetRow, ...] = ()
    rows: list[TargetRow] = field(default_factory=list)
    num_run: int = 0
    rejected: bool = False

    @property
    def num_left(self) -> int:
        """Tokens that are still to run."""
        return 0 if self.rejected else len(self.plan.feed) - self.num_run

    @property
    def whole(self) -> bool:
        """Whether it runs in one piece."""
        return self.plan.tree is not None

    def segment(self, most: int) -> Segment[Cache]:
        """The next tokens, at most so many; with a tree all."""
        feed, row_ids, choices_at = self.plan.feed, self.plan.row_ids, self.plan.choices_at
        begin, end = self.num_run, min(self.num_run + most, len(feed))
        if self.whole:
            end = len(feed)
        first = len(feed) - len(row_ids)  # the token that the first row follows
        wants = tuple(
            Want(
                index - begin, row_ids[index - first], choices_at[index - first],
                top=self.plan.top, entropy=self.plan.entropy, features=self.plan.features,
                scored=self.plan.scored[index - first] if self.plan.scored else (),
            )
            for index in range(max(begin, first), end)
        )  # fmt: skip
        parents = self.plan.parents
        return Segment(self.cache, feed[begin:end], wants, parents, continues=bool(self.rows))

    def add(self, segment: Segment[Cache], rows: list[TargetRow]) -> None:
        """The rows of a segment that has run."""
        self.num_run += len(segment.tokens)
        self.rows += rows

    def event(self, verify_ms: float, now_ms: float, share: float = 1.0) -> Event:
        """The event for the session's machine once nothing is left; see `RowsReady`."""
        if self.rejected:
            return PrehitFailed(self.job, self.plan, self.kept[0], now_ms)
        rows = (*self.kept, *self.rows)
        return RowsReady(self.job, self.plan, rows, verify_ms, now_ms, share)


def begin_pass(
    target: Target[Cache],
    cache: Cache,
    state: CloudState,
    forward: Forward,
    most: int | None = None,
) -> SessionPass[Cache]:
    """Begin a pass now: plan it, judge its first token by the kept row, or have a tree proposed.

    Args:
        most: tokens of a tree, where there is less room in the pass than the session may take.

    Raises:
        LocalError: what has been proposed is no tree for this pass.
    """
    made = plan(state, forward)
    if made.prehit is None:
        return SessionPass(cache, forward.job, _with_tree(target, cache, state, made, most))
    kept = target.row(cache, made.prehit.index, made.prehit.want)
    rejected = not made.prehit.test.passes(kept)
    return SessionPass(cache, forward.job, made, (kept,), rejected=rejected)


def _with_tree(
    target: Target[Cache], cache: Cache, state: CloudState, made: Plan, most: int | None
) -> Plan:
    room = made.most if most is None else min(made.most, most)
    if room <= 0:
        return made
    rows = state.method.acceptance.compares
    tree = target.propose(cache, made.feed, room, rows)
    tree.check(target.vocab_size, room, rows)
    return planned(state, made, tree)


def prompt_segment(
    cache: Cache, effect: Prefill, first: int = 0, count: int | None = None
) -> Segment[Cache]:
    """Tokens of a prompt from index `first` on, at most `count`, with rows where its
    log-probabilities are wanted."""
    part = slice(first, None if count is None else first + count)
    following = effect.scored[part]
    wants = tuple(Want(i, top=True, scored=(token,)) for i, token in enumerate(following))
    return Segment(cache, effect.tokens[part], wants)


def run_pass(
    target: Target[Cache],
    cache: Cache,
    state: CloudState,
    forward: Forward,
    most: int | None = None,
) -> SessionPass[Cache]:
    """A whole pass of one session, in one piece; arguments as in `begin_pass`."""
    begun = begin_pass(target, cache, state, forward, most)
    if begun.num_left:
        segment = begun.segment(begun.num_left)
        begun.add(segment, target.run([segment])[0])
    return begun
