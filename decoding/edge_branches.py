"""What the edge drafts next, on the chain or on a branch, and what becomes of branches."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct
from msgspec.structs import replace

from decoding.edge_events import Drafted
from decoding.edge_flow import Decided
from decoding.edge_state import EdgeState, InFlight, Job
from decoding.prefix_hash import chain, extended
from decoding.rescue import CERTAIN, Branch, Fork, doubts


def next_job(state: EdgeState, now_ms: float) -> tuple[Job, int] | None:
    """The draft job that is worth most now and how many tokens it writes, or None; `state` has
    none that runs."""
    flow, ends = state.flow, bool(state.drafted) and state.drafted[-1] in state.eos
    if state.in_flight and flow.awaits:
        return None
    room = min(flow.budget, state.num_remaining) - len(state.drafted)
    count = 0 if ends else min(flow.message, room, state.spec.draft_context - len(state.text))
    fork = _best_fork(state, least_reach(state, count))
    if fork is not None:
        left = len(state.tokens) + state.num_remaining - fork.end
        count = min(flow.message, left, state.spec.draft_context - fork.end)
    if count <= 0:
        return None
    start, cached = len(state.text), state.num_cached
    if fork is not None:
        start, cached = fork.end, min(cached, fork.start)
    job = Job(state.last_job + 1, start, cached, flow.awaits, now_ms, fork)
    return job, count


def feed_of(state: EdgeState, job: Job) -> tuple[int, ...]:
    """What the draft reads before its first token."""
    if job.fork is None:
        return state.text[job.num_cached :]
    return state.text[job.num_cached : job.fork.start] + job.fork.tokens


def least_reach(state: EdgeState, chain_count: int) -> float | None:
    """What a branch must exceed: what the pace asks for, and the chain where that may go on; None
    where there are no branches."""
    rescue = state.flow.rescue
    if rescue is None or state.spec.method.needs_rows(state.spec.sampling):
        return None
    if chain_count <= 0:
        return rescue
    reach = 1.0
    for doubt in state.doubts:
        reach *= state.measures.beliefs.rates(doubt)[0]
    return max(rescue, reach)


def _best_fork(state: EdgeState, least: float | None) -> Fork | None:
    if least is None:
        return None
    reach, fork = max(_forks(state), key=lambda found: found[0], default=(0.0, None))
    return fork if reach > least else None


def _forks(state: EdgeState) -> Iterator[tuple[float, Fork]]:
    """Where a branch may begin or go on, and how likely the text comes by there."""
    beliefs, reach = state.measures.beliefs, 1.0
    branches = {branch.start: branch for branch in state.branches}
    hashes = chain(state.text_hash, state.drafted)
    end = min(
        len(state.tokens) + min(state.num_remaining, state.flow.budget), state.spec.draft_context
    )
    for start, (doubt, before) in enumerate(
        zip(state.doubts, hashes, strict=False), len(state.tokens)
    ):
        first, second = beliefs.rates(doubt)
        branch = branches.get(start)
        if branch is not None:
            worth = reach * second
            for inner in branch.doubts:
                worth *= beliefs.rates(inner)[0]
            if branch.end < end and branch.tokens[-1] not in state.eos:
                yield worth, Fork(start, branch.tokens, before)
        elif doubt.second is not None and doubt.second not in state.eos and start + 1 < end:
            yield reach * second, Fork(start, (doubt.second,), before)
        reach *= first


def branched(state: EdgeState, fork: Fork, event: Drafted) -> tuple[EdgeState, InFlight | None]:
    """With what was drafted on a branch, and the window of it; None where the text has passed the
    branch meanwhile, or nothing was drafted."""
    known = {branch.start: branch for branch in state.branches}
    gone = fork.start < len(state.tokens) or fork.start >= len(state.text)
    if gone or not event.tokens:
        return state, None
    branch = known.get(fork.start)
    more = doubts(event.q_ids, event.q_probs, state.spec.sampling, event.start)
    tokens, start = event.tokens, event.start
    if branch is None:  # its first token is sent with those after it
        branch = Branch(fork.start, (), fork.follows, (CERTAIN,) * (len(fork.tokens) - 1))
        tokens, start = (*fork.tokens, *tokens), fork.start
    flight = InFlight(
        number=state.last_number + 1,
        start=start,
        tokens=tokens,
        follows=branch.text_hash,
        rows=None,
        threshold=state.threshold_at(event.now_ms),
        draft_ms=event.draft_ms,
        drafted_ms=event.now_ms - event.draft_ms,
        sent_ms=event.now_ms,
        num_sends=0,
        branch=fork.start,
    )
    after = extended(branch.text_hash, tokens)
    known[fork.start] = branch.longer(tokens, after, more)
    state = replace(
        state,
        branches=tuple(known.values()),
        branch_windows=(*state.branch_windows, flight),
        last_number=flight.number,
    )
    return state, flight


class Rescue(Struct, frozen=True):
    """What goes on where the text turns to a second choice: a branch, the job that drafts it, or
    both."""

    branch: Branch | None
    job: Job | None


def rescue(state: EdgeState, text: Decided) -> Rescue | None:
    """Of the state before the text."""
    if not text.rejected:
        return None
    at, token = len(state.tokens) + text.agreed, text.new[text.agreed]
    job = state.job
    if job is None or job.fork is None or (job.fork.start, job.fork.tokens[0]) != (at, token):
        job = None
    found = (b for b in state.branches if b.start == at and b.tokens[0] == token)
    branch = next(found, None)
    return None if job is None and branch is None else Rescue(branch, job)


def turned(state: EdgeState, found: Rescue | None) -> EdgeState:
    """The text, of which `state` has all, has turned away from the chain: what is rescued is the
    chain now, and all else goes."""
    job = None if found is None or found.job is None else replace(found.job, fork=None)
    branch, flights = None if found is None else found.branch, state.branch_windows
    state = replace(
        state, drafted=(), doubts=(), draft_hash=state.text_hash, branches=(), branch_windows=(),
        in_flight=(), job=job,
    )  # fmt: skip
    if branch is None:
        return state
    first, *others = (replace(f, branch=None) for f in flights if f.branch == branch.start)
    first = replace(
        first, start=first.start + 1, tokens=first.tokens[1:], follows=state.text_hash
    )  # its own first token is the text's last
    return replace(
        state,
        drafted=branch.tokens[1:],
        doubts=branch.doubts,
        draft_hash=branch.text_hash,
        in_flight=(first, *others),
    )


def without_passed(state: EdgeState) -> EdgeState:
    """Without branches that the text has passed."""
    at = len(state.tokens)
    if not state.branches:
        return state
    return replace(
        state,
        branches=tuple(branch for branch in state.branches if branch.start >= at),
        branch_windows=tuple(f for f in state.branch_windows if (f.branch or 0) >= at),
    )
