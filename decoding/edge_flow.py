"""What the edge learns from drafts and feedback, and the flow its pace derives from that."""

from __future__ import annotations

from msgspec.structs import replace

from bus.protocol.messages import Feedback
from decoding.edge_events import Drafted
from decoding.edge_state import EdgeState, InFlight, PreviousWindow
from decoding.methods.base import PaceView
from decoding.pacing import eta, forecast

MAX_FEED = 2
"""Tokens a draft job may run before its first own one and still be a measure of a step."""


def with_flow(state: EdgeState) -> EdgeState:
    """`state` with what its pace wants to keep in flight."""
    spec = state.spec
    view = PaceView(
        window=state.control.window,
        bonus=spec.sampling.coupled,
        ahead=any(not flight.message.awaits for flight in state.in_flight),
        growth=state.growth,
        forecast=forecast(state.measures) if spec.method.pace.forecasts else None,
    )
    return replace(state, flow=spec.method.pace.flow(view))


def draft_measured(state: EdgeState, event: Drafted) -> EdgeState:
    """With the time of the draft job that has just ended, unless it began with a long feed."""
    num_tokens = len(event.tokens)
    if not num_tokens or event.start - state.num_cached > MAX_FEED:
        return state
    gap_ms = event.now_ms - state.issued_ms - event.draft_ms
    measures = state.measures.drafted(num_tokens, event.draft_ms, gap_ms, alone=state.job_awaits)
    return replace(state, measures=measures)


def feedback_measured(
    state: EdgeState, flight: InFlight, feedback: Feedback, num_accepted: int, now_ms: float
) -> EdgeState:
    """With what feedback tells about acceptance, link and cloud.

    Args:
        flight: the judged window, the last of those this feedback is about.
        num_accepted: tokens accepted by it, in all these windows.

    A window that was sent twice says nothing about the path (Karn's rule), and the first feedback
    of an incarnation nothing about the queue: it may have waited for the prompt. Others' share of
    the queue of a pass is what is left of the time since the feedback before it without the pass.
    """
    message = flight.message
    rejected = num_accepted < state.num_ahead_of(flight)
    share = feedback.num_accepted / message.num_tokens
    measures = replace(
        state.measures, acceptance=state.measures.acceptance.verdict(num_accepted, rejected)
    )
    if feedback.pass_tokens:
        measures = measures.passed(feedback.pass_tokens, feedback.verify_ms, alone=message.awaits)
    if flight.num_sends > 1:
        timer = state.timer.answered_late(flight.num_sends)
    else:
        timer = state.timer.sample(now_ms - flight.sent_ms)
        measures = measures.answered(rtt_of(flight, feedback, now_ms))
    if state.heard_ms is not None and feedback.pass_tokens:
        left_ms = now_ms - state.heard_ms - feedback.verify_ms
        measures = measures.queued(max(0.0, min(feedback.queue_ms, left_ms)))
    thrown = message.num_tokens - feedback.num_accepted
    previous = PreviousWindow(
        edge_ms=max(0.0, now_ms - flight.drafted_ms),
        rework_ms=message.draft_ms * thrown / message.num_tokens,
        rtt_ms=rtt_of(flight, feedback, now_ms),
    )
    growth = (1.0 if rejected else state.growth) * (1.0 + eta(share))
    return replace(
        state, measures=measures, growth=growth, timer=timer, previous=previous, heard_ms=now_ms
    )


def rtt_of(flight: InFlight, feedback: Feedback, now_ms: float) -> float:
    """Round trip of a window without verification and queueing, in ms."""
    return max(0.0, now_ms - flight.sent_ms - feedback.verify_ms - feedback.queue_ms)
