"""What the edge asks of its draft, and the windows that come of it."""

from __future__ import annotations

from msgspec.structs import replace

from bus.protocol.errors import ImpossibleEventError
from bus.protocol.messages import Feedback
from decoding.common import common_length
from decoding.edge_branches import branched, feed_of, next_job
from decoding.edge_events import Crop, Draft, Drafted, Effect, Learn
from decoding.edge_flow import agreement_measured, draft_measured
from decoding.edge_messages import new_window, sent_windows
from decoding.edge_state import EdgeState, Opening, Running, Step
from decoding.prefix_hash import extended
from decoding.rescue import CERTAIN, Doubt, Fork, doubts
from decoding.token_features import carried


def draft_more(state: EdgeState, now_ms: float) -> Step:
    """Ask for the tokens the flow allows now, on the chain or a branch, never beyond the end of the
    answer."""
    able = isinstance(state.stage, Opening | Running) and state.spec.drafts
    if not able or state.job is not None:
        return state, ()
    found = next_job(state, now_ms)
    if found is None:
        return state, ()
    job, count = found
    draft = Draft(job.number, feed_of(state, job), count)
    state = replace(state, last_job=job.number, job=job)
    if job.num_cached == state.num_cached:
        return state, (draft,)
    return replace(state, num_cached=job.num_cached), (Crop(job.num_cached), draft)


def learnt(state: EdgeState, feedback: Feedback, count: int) -> tuple[Effect, ...]:
    """What a feedback that brings `count` tokens after the text teaches a draft."""
    start = len(state.tokens)
    features = carried(feedback, start, count) if state.spec.reads_features else None
    return () if features is None else (Learn(start - 1, features),)


def drafted(state: EdgeState, event: Drafted) -> Step:
    if event.job > state.last_job:
        raise ImpossibleEventError(f"job {event.job} has ended, {state.last_job} is the newest")
    job = state.job
    if job is None or event.job != job.number:
        return state, ()
    state = replace(draft_measured(state, job, event), job=None)
    if job.fork is not None:
        return _branch_drafted(state, job.fork, event)
    silent_at = None if event.tokens else event.start
    state = replace(state, num_cached=event.num_cached, silent_at=silent_at)
    text = state.text[event.start :]  # that has come since the job began
    both = min(len(text), len(event.tokens))
    agreed = common_length(text, event.tokens)
    state = agreement_measured(state, agreed, agreed < both)
    effects: tuple[Effect, ...] = ()
    if agreed < both:
        state = replace(state, num_cached=min(state.num_cached, event.start + agreed))
        effects = (Crop(state.num_cached),)
    elif len(event.tokens) > len(text):
        state, effects = _send_window(state, event, len(text))
    state, more = draft_more(state, event.now_ms)
    return state, effects + more


def _branch_drafted(state: EdgeState, fork: Fork, event: Drafted) -> Step:
    """What the branch has taken in the draft's cache is the chain's again."""
    effects: tuple[Effect, ...] = (Crop(state.num_cached),)
    state, flight = branched(state, fork, event)
    if flight is not None:
        state, sends = sent_windows(state, (flight,), event.now_ms)
        effects += sends
    state, more = draft_more(state, event.now_ms)
    return state, effects + more


def _send_window(state: EdgeState, event: Drafted, first: int) -> Step:
    """The drafted tokens from index `first` on; the text has those before it already."""
    tokens = event.tokens[first:]
    flight = new_window(state, event, event.start + first, tokens, state.draft_hash)
    state = replace(
        state,
        drafted=state.drafted + tokens,
        doubts=state.doubts + _doubts(state, event)[first:],
        draft_hash=extended(state.draft_hash, tokens),
        in_flight=(*state.in_flight, flight),
        last_number=flight.number,
    )
    return sent_windows(state, (flight,), event.now_ms)


def _doubts(state: EdgeState, event: Drafted) -> tuple[Doubt, ...]:
    if state.flow.rescue is None:
        return (CERTAIN,) * len(event.tokens)
    return doubts(event.q_ids, event.q_probs, state.spec.sampling, event.start)
