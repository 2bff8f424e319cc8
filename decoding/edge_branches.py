"""What the edge drafts next, on the chain or on a branch, and what becomes of branches."""

from __future__ import annotations

from math import prod

from msgspec import Struct
from msgspec.structs import replace

from decoding.edge_events import Drafted
from decoding.edge_flow import Decided
from decoding.edge_messages import new_window
from decoding.edge_state import Branch, EdgeState, InFlight, Job
from decoding.prefix_hash import extended
from decoding.rescue import CERTAIN, Fork, doubts


def next_job(state: EdgeState, now_ms: float) -> tuple[Job, int] | None:
    """The draft job that is worth most now and how many tokens it writes, or None; `state` has
    none that runs."""
    flow, ends = state.flow, bool(state.drafted) and state.drafted[-1] in state.eos
    ends = ends or state.silent_at == len(state.text)
    if state.in_flight and flow.awaits:
        return None
    room = min(flow.budget, state.num_remaining) - len(state.drafted)
    count = 0 if ends else min(flow.message, room, state.spec.draft_context - len(state.text))
    start, cached = len(state.text), state.num_cached
    fork = _best_fork(state, chain_may_go_on=count > 0)
    if fork is not None:
        left = len(state.tokens) + state.num_remaining - fork.end
        count = min(flow.message, left, state.spec.draft_context - fork.end)
        start, cached = fork.end, min(cached, fork.start)
    if count <= 0:
        return None
    return Job(state.last_job + 1, start, cached, flow.awaits, now_ms, fork), count


def feed_of(state: EdgeState, job: Job) -> tuple[int, ...]:
    """What the draft reads before its first token."""
    if job.fork is None:
        return state.text[job.num_cached :]
    return state.text[job.num_cached : job.fork.start] + job.fork.tokens


def _best_fork(state: EdgeState, chain_may_go_on: bool) -> Fork | None:
    """Where a branch begins or goes on that is likelier to be reached than the pace asks for, and
    than the end of the chain where that may go on."""
    least = state.flow.rescue
    if least is None or state.spec.method.needs_rows(state.spec.sampling):
        return None
    beliefs, reach = state.measures.beliefs, 1.0
    branches = {branch.start: branch for branch in state.branches}
    best: tuple[int, tuple[int, ...]] | None = None
    for start, doubt in enumerate(state.doubts, len(state.tokens)):
        first, second = beliefs.rates(doubt)
        worth = reach * second
        tokens: tuple[int, ...] = () if doubt.second is None else (doubt.second,)
        if (branch := branches.get(start)) is not None:
            worth *= prod(beliefs.rates(inner)[0] for inner in branch.doubts)
            tokens = branch.tokens
        if tokens and worth > least and _may_go_on(state, start, tokens):
            best, least = (start, tokens), worth
        reach *= first
    if best is None or (chain_may_go_on and least <= reach):
        return None
    start, tokens = best
    before = state.drafted[: start - len(state.tokens)]
    return Fork(start, tokens, extended(state.text_hash, before))


def _may_go_on(state: EdgeState, start: int, tokens: tuple[int, ...]) -> bool:
    """Whether more can be drafted after a branch's tokens."""
    budget_end = len(state.tokens) + min(state.num_remaining, state.flow.budget)
    end = min(budget_end, state.spec.draft_context)
    return start + len(tokens) < end and tokens[-1] not in state.eos


def branched(state: EdgeState, fork: Fork, event: Drafted) -> tuple[EdgeState, InFlight | None]:
    """With what was drafted on a branch, and the window of it; None where the text has passed the
    branch meanwhile, or nothing was drafted."""
    gone = fork.start < len(state.tokens) or fork.start >= len(state.text)
    if gone or not event.tokens:
        return state, None
    branches = {branch.start: branch for branch in state.branches}
    branch, tokens, start = branches.get(fork.start), event.tokens, event.start
    if branch is None:  # its first token is sent with those after it
        branch = Branch(fork.start, (), fork.follows, (CERTAIN,) * (len(fork.tokens) - 1))
        tokens, start = (*fork.tokens, *tokens), fork.start
    flight = new_window(state, event, start, tokens, branch.text_hash, branch=True)
    more = doubts(event.q_ids, event.q_probs, state.spec.sampling, event.start)
    branches[fork.start] = replace(
        branch,
        tokens=branch.tokens + tokens,
        text_hash=extended(branch.text_hash, tokens),
        doubts=branch.doubts + more,
        windows=(*branch.windows, flight),
    )
    return replace(state, branches=tuple(branches.values()), last_number=flight.number), flight


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
    branch = None if found is None else found.branch
    state = replace(
        state, drafted=(), doubts=(), draft_hash=state.text_hash, branches=(), in_flight=(),
        job=job, silent_at=None,
    )  # fmt: skip
    if branch is None:
        return state
    first, *others = (replace(flight, branch=False) for flight in branch.windows)
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
    if not state.branches:
        return state
    ahead = (branch for branch in state.branches if branch.start >= len(state.tokens))
    return replace(state, branches=tuple(ahead))
