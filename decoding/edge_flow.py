"""What the edge learns from drafts and feedback, and the flow its pace derives from that."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct
from msgspec.structs import replace

from bus.protocol.messages import Feedback, Outcome
from decoding.common import common_length
from decoding.edge_events import Drafted, WindowJudged
from decoding.edge_state import EdgeState, InFlight, Job, PreviousWindow, Running
from decoding.methods.base import PaceView
from decoding.pacing import eta, forecast
from decoding.rescue import Doubt

MAX_FEED = 2
"""Tokens a draft job may run before its first own one and still be a measure of a step."""


def with_flow(state: EdgeState, now_ms: float) -> EdgeState:
    """`state` with what its pace wants to keep in flight.

    After a time without drafts, what was known of acceptance counts for little.
    """
    pace, idle_ms = state.spec.method.pace, state.idle_since_ms
    view = PaceView(
        window=state.control.window,
        ahead=not state.flow.awaits,
        growth=state.growth,
        forecast=forecast(state.measures) if pace.forecasts else None,
        idle_ms=0.0 if idle_ms is None else now_ms - idle_ms,
    )
    flow = pace.flow(view)
    if not flow.message:
        return replace(state, flow=flow, idle_since_ms=now_ms if idle_ms is None else idle_ms)
    if idle_ms is not None:
        acceptance = state.measures.acceptance.recalled()
        measures = replace(state.measures, acceptance=acceptance)
        state = replace(state, measures=measures, idle_since_ms=None)
    return replace(state, flow=flow)


def draft_measured(state: EdgeState, job: Job, event: Drafted) -> EdgeState:
    """With the time of the draft job that has just ended, unless it began with a long feed."""
    num_tokens = len(event.tokens)
    if not num_tokens or job.start - job.num_cached > MAX_FEED:
        return state
    gap_ms = event.now_ms - job.issued_ms - event.draft_ms
    measures = state.measures.drafted(num_tokens, event.draft_ms, gap_ms, alone=job.awaits)
    return replace(state, measures=measures)


def feedback_measured(state: EdgeState, feedback: Feedback, now_ms: float) -> EdgeState:
    """With what feedback shows about link and cloud, whatever it commits.

    It names the last message that had come to the cloud, each a measure of the round trip once; a
    window that was sent twice says nothing (Karn's rule). The first feedback of an incarnation says
    nothing about the queue: it may have waited for the prompt. Others' share of the queue of a pass
    is what is left of the time since the feedback before it without the pass.
    """
    stage = state.stage
    assert isinstance(stage, Running)
    measures, timer, rtt_ms = state.measures, state.timer, state.rtt_ms
    sent_ms = dict(state.sent).get(-1 if feedback.number is None else feedback.number)
    if feedback.pass_tokens:
        alone = state.flow.awaits or not state.flow.message
        measures = measures.passed(feedback.pass_tokens, feedback.verify_ms, alone)
        if stage.heard_ms is not None:
            left_ms = now_ms - stage.heard_ms - feedback.verify_ms
            measures = measures.queued(max(0.0, min(feedback.queue_ms, left_ms)))
    if sent_ms is not None:
        rtt_ms = max(0.0, now_ms - sent_ms - feedback.held_ms)
        measures, timer = measures.answered(rtt_ms), timer.sample(now_ms - sent_ms)
    elif stage.num_asks:
        timer = timer.answered_late(stage.num_asks + 1)
    number = feedback.number
    sent = state.sent if number is None else tuple(s for s in state.sent if s[0] > number)
    return replace(state, measures=measures, timer=timer, rtt_ms=rtt_ms, sent=sent)


class Decided(Struct, frozen=True):
    """What new text says of what was drafted.

    Attributes:
        new: tokens that go on the committed text; agreed: how many of the first were drafted.
        rejected: the token after those was drafted otherwise.
    """

    new: tuple[int, ...]
    agreed: int
    rejected: bool


def decided(state: EdgeState, new: tuple[int, ...]) -> Decided:
    """Compare new text with the drafts."""
    agreed = common_length(new, state.drafted)
    return Decided(new, agreed, agreed < min(len(new), len(state.drafted)))


def judged_windows(
    state: EdgeState, text: Decided, feedback: Feedback, now_ms: float, rescued: bool
) -> tuple[WindowJudged, ...]:
    """The facts of each window that new text decides, of the state before it; one of outcome `own`
    where it decides none. The last is that of a rejection, if there is one: `rescued` or not."""
    good = len(state.tokens) + text.agreed
    windows = [f for f in state.in_flight if f.end <= good or (text.rejected and f.start <= good)]
    facts: list[WindowJudged] = []
    at = len(state.tokens)
    for flight in windows:
        whole, last = flight.end <= good, flight is windows[-1]
        end = len(state.tokens) + len(text.new) if last else flight.end
        fact = _fact(state, feedback, now_ms, end, first=not facts)
        facts.append(
            replace(
                fact,
                number=flight.number,
                outcome=_outcome(whole, flight.start == good and feedback.prehit),
                num_drafted=len(flight.tokens),
                num_accepted=min(flight.end, good) - flight.start,
                num_committed=end - at,
                rolled_back=not whole,
                threshold=flight.threshold,
                draft_ms=flight.draft_ms,
                rescued=rescued and last,
            )
        )
        at = end
    if not facts and text.new:
        fact = _fact(state, feedback, now_ms, at + len(text.new), first=True)
        fact = replace(
            fact, num_committed=len(text.new), rolled_back=text.rejected, rescued=rescued
        )
        if feedback.proposed:
            fact = _of_tree(fact, state, text, feedback)
        return (fact,)
    return tuple(facts)


def tree_accepted(state: EdgeState, text: Decided, feedback: Feedback) -> int:
    """How many of the first tokens of new text are of a tree that the target's speculator has
    proposed: all that the feedback carries but the last. `state` is that before the text."""
    if not feedback.proposed:
        return 0
    known = len(state.tokens) - feedback.start
    return max(0, min(len(feedback.token_ids) - 1 - known, len(text.new)))


def _of_tree(
    fact: WindowJudged, state: EdgeState, text: Decided, feedback: Feedback
) -> WindowJudged:
    """With the tree that the pass has judged, as a window of its depth."""
    num_accepted = tree_accepted(state, text, feedback)
    lenient = state.spec.method.sends_threshold
    return replace(
        fact,
        outcome=_outcome(num_accepted >= feedback.depth, prehit=False),
        num_drafted=feedback.depth,
        num_accepted=min(num_accepted, feedback.depth),
        proposed=feedback.proposed,
        threshold=state.threshold_at(fact.at_ms) if lenient else 0.0,
    )


def _outcome(whole: bool, prehit: bool) -> Outcome:
    if whole:
        return Outcome.ACCEPTED
    return Outcome.PREHIT_REJECTED if prehit else Outcome.PARTIAL


def _fact(
    state: EdgeState, feedback: Feedback, now_ms: float, length: int, first: bool
) -> WindowJudged:
    return WindowJudged(
        incarnation=state.incarnation, number=0, outcome=Outcome.OWN, num_drafted=0, num_accepted=0,
        num_committed=0, rolled_back=False, length=length, threshold=0.0,
        window=state.control.window, credit=state.control.credit, budget=state.flow.budget,
        in_flight=len(state.drafted), draft_ms=0.0,
        verify_ms=feedback.verify_ms, queue_ms=feedback.queue_ms,
        pass_tokens=feedback.pass_tokens if first else 0, rtt_ms=state.rtt_ms, at_ms=now_ms,
    )  # fmt: skip


def text_measured(
    state: EdgeState, text: Decided, facts: tuple[WindowJudged, ...], now_ms: float
) -> EdgeState:
    """With what new text says about acceptance; of the state before it."""
    measures = agreement_measured(state, text.agreed, text.rejected).measures
    if state.flow.rescue is not None:
        measures = replace(measures, beliefs=measures.beliefs.seen(_ranks(state, text)))
    growth, previous = state.growth, state.previous
    flights = {flight.number: flight for flight in state.in_flight}
    for fact in facts:
        if fact.num_drafted and fact.number in flights:
            flight = flights[fact.number]
            growth = (1.0 if fact.rolled_back else growth) * (
                1.0 + eta(fact.num_accepted / fact.num_drafted)
            )
            previous = _costs(flight, fact, now_ms)
    return replace(state, measures=measures, growth=growth, previous=previous)


def _ranks(state: EdgeState, text: Decided) -> Iterator[tuple[Doubt, int]]:
    """Which of the draft's choices the target's token was, at each place that is decided."""
    for doubt in state.doubts[: text.agreed]:
        yield doubt, 0
    if text.rejected and text.agreed < len(state.doubts):
        doubt = state.doubts[text.agreed]
        yield doubt, 1 if doubt.second == text.new[text.agreed] else 2


def _costs(flight: InFlight, fact: WindowJudged, now_ms: float) -> PreviousWindow:
    thrown = fact.num_drafted - fact.num_accepted
    return PreviousWindow(
        edge_ms=max(0.0, now_ms - flight.drafted_ms),
        rework_ms=flight.draft_ms * thrown / fact.num_drafted,
    )


def agreement_measured(state: EdgeState, agreed: int, rejected: bool) -> EdgeState:
    """With drafted tokens that are the target's, and maybe one that is not."""
    if not agreed and not rejected:
        return state
    acceptance = state.measures.acceptance.judged_as(agreed, rejected)
    return replace(state, measures=replace(state.measures, acceptance=acceptance))
