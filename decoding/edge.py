"""One session at the edge, as a pure state machine: `step(state, event) → (state, effects)`.

    phase      event              next       effects
    ---------  -----------------  ---------  -------------------------------------------------
    (begin)                       SEEKING    SeekPeer
    SEEKING    Started            OPENING    Send OpenSession; Draft the first window meanwhile
    OPENING    Opened             RUNNING    Send the windows that wait, or were in flight
    OPENING    Tick, overdue      OPENING    Send OpenSession again; CheckPeer when it drags on
    OPENING,   Drafted            same       Send the window (RUNNING), or keep it (OPENING)
      RUNNING
    RUNNING    FeedbackArrived    RUNNING    Commit; on a rejection Crop and a higher epoch;
                                             Draft what the pace allows
               … end reached      FINISHED   Commit, Send CloseSession, Finish
               … unknown session  OPENING    Send OpenSession with a higher incarnation;
                                             SEEKING, SeekPeer where that has failed before
    RUNNING    Tick, overdue      RUNNING    Send the window again; CheckPeer when it drags on
    OPENING,   PeerLost           SEEKING    SeekPeer
      RUNNING  FaultArrived
               … full, failed, …  SEEKING    SeekPeer, after a pause that grows
               … cannot be helped FINISHED   Send CloseSession, Finish with the reason
    any        Ended, StopMatched FINISHED   Send CloseSession, Finish

The edge owns the truth about committed tokens: `tokens` only grows, and by `Commit` alone. The
draft is a function of prefix and seed, so windows in flight survive a move to another cloud
worker: they are renumbered, not drafted again.

This module knows no clock, no socket and no model: times come with events, work goes out as
effects, run in order. An event that cannot happen raises `ImpossibleEventError`; what merely comes
late or twice changes nothing.
"""

from __future__ import annotations

from msgspec.structs import replace

from bus.protocol.errors import ImpossibleEventError
from bus.protocol.messages import (
    CloseSession,
    Fault,
    FaultCode,
    Feedback,
    FinishReason,
    Outcome,
)
from decoding.edge_events import (
    CheckPeer,
    Commit,
    ControlArrived,
    Crop,
    Draft,
    Drafted,
    Effect,
    Ended,
    Event,
    FaultArrived,
    FeedbackArrived,
    Finish,
    Opened,
    PeerLost,
    SeekPeer,
    Send,
    Started,
    StopMatched,
    Tick,
    WindowJudged,
)
from decoding.edge_flow import draft_measured, feedback_measured, rtt_of, with_flow
from decoding.edge_messages import fits, opening, window
from decoding.edge_state import MAX_INCARNATION, Control, EdgeState, InFlight, Phase, SessionSpec
from decoding.timing import pause_before

__all__ = [
    "CHECK_PEER_AFTER_SENDS", "CURABLE", "GIVE_UP_AFTER_FAILURES", "GIVE_UP_AFTER_SENDS",
    "MAX_INCARNATION", "Control", "EdgeState", "InFlight", "Phase", "SessionSpec", "Step", "begin",
    "step",
]  # fmt: skip

CHECK_PEER_AFTER_SENDS = 3
"""Sends without an answer after which the peer is looked up in the registry [ours]."""
GIVE_UP_AFTER_SENDS = 12
"""Sends without an answer after which even a registered peer counts as lost [ours]."""
GIVE_UP_AFTER_FAILURES = 4
"""Failures of cloud workers, without feedback in between, that end the session [ours]."""
CURABLE = frozenset((FaultCode.OUT_OF_ORDER, FaultCode.MODEL_FAILED, FaultCode.STALE_INCARNATION))
"""Faults after which the session may well go on, here or elsewhere."""
Step = tuple[EdgeState, tuple[Effect, ...]]


def begin(
    spec: SessionSpec,
    control: Control,
    committed: tuple[int, ...] = (),
    incarnation: int = 0,
    last_incarnation: int = MAX_INCARNATION,
) -> Step:
    """A new session, or one taken over with tokens already promised to its user. Others may have
    used incarnations up to `incarnation`; those above `last_incarnation` are its successors'."""
    state = with_flow(
        EdgeState(
            spec=spec,
            control=control,
            phase=Phase.SEEKING,
            incarnation=incarnation,
            last_incarnation=last_incarnation,
            tokens=spec.prompt + committed,
        )
    )
    return state, (SeekPeer("new session"),)


def step(state: EdgeState, event: Event) -> Step:
    """Advance one session by one event."""
    if state.phase is Phase.FINISHED:
        return state, ()
    match event:
        case Started(eos, now_ms, measures):
            if state.phase is not Phase.SEEKING:
                raise ImpossibleEventError(f"a worker was found in phase {state.phase.value}")
            if measures is not None and not state.measures.known:
                state = with_flow(replace(state, measures=measures))
            state = replace(state, eos=eos)
            reason = state.end_reached()  # a session taken over may have been at its end
            return _open(state, now_ms) if reason is None else _finish(state, reason)
        case Opened(message, now_ms):
            return _opened(state, message.incarnation, now_ms)
        case Drafted():
            return _drafted(state, event)
        case FeedbackArrived(message, now_ms):
            return _feedback(state, message, now_ms)
        case ControlArrived(message, now_ms):
            control = state.control.updated(message, now_ms)
            return with_flow(replace(state, control=control)), ()
        case FaultArrived(message, now_ms):
            return _fault(state, message, now_ms)
        case Tick(now_ms):
            return _tick(state, now_ms)
        case PeerLost():
            return _seek(state, "the cloud worker is gone")
        case StopMatched(num_generated):
            if num_generated > state.num_generated:
                raise ImpossibleEventError(
                    f"a stop string ends in token {num_generated} of {state.num_generated}"
                )
            kept = state.tokens[: len(state.spec.prompt) + num_generated]
            return _finish(replace(state, tokens=kept), FinishReason.STOP)
        case Ended(reason, error):
            return _finish(state, reason, error)


# --- opening ----------------------------------------------------------------------------------


def _open(state: EdgeState, now_ms: float) -> Step:
    """Open, or open again, under the next incarnation; windows in flight move along. One that was
    refused before a window went out under it is used again."""
    incarnation = state.incarnation + (0 if state.unused else 1)
    if incarnation > state.last_incarnation:
        why = f"no cloud worker kept the session, after {incarnation} incarnations; submit it again"
        return _finish(state, FinishReason.ERROR, why)
    first = state.in_flight[0].message.seq if state.in_flight else state.next_seq
    state = replace(
        state,
        phase=Phase.OPENING,
        incarnation=incarnation,
        unused=False,
        opens_sent=0,
        heard_ms=None,
    )
    moved = tuple(
        replace(
            flight,
            message=replace(flight.message, incarnation=state.incarnation),
            num_sends=0,
        )
        for flight in state.in_flight
    )
    state, effects = _send_open(
        replace(state, in_flight=moved, next_seq=first + len(moved)), now_ms
    )
    state, more = _draft_more(state, now_ms)
    return state, effects + more


def _send_open(state: EdgeState, now_ms: float) -> Step:
    message = opening(state)
    return replace(state, opens_sent=state.opens_sent + 1, open_sent_ms=now_ms), (Send(message),)


def _opened(state: EdgeState, incarnation: int, now_ms: float) -> Step:
    if state.phase is not Phase.OPENING or incarnation != state.incarnation:
        return state, ()
    state = replace(state, phase=Phase.RUNNING)
    flights = tuple(replace(f, sent_ms=now_ms, num_sends=1) for f in state.in_flight)
    sends = tuple(Send(flight.message) for flight in flights)
    state, more = _draft_more(replace(state, in_flight=flights), now_ms)
    return state, sends + more


def _seek(state: EdgeState, why: str, pause_ms: float = 0.0, leave: bool = True) -> Step:
    if state.phase is Phase.SEEKING:
        return state, ()
    return replace(state, phase=Phase.SEEKING), (SeekPeer(why, pause_ms, leave),)


def _start_over(state: EdgeState, why: str, now_ms: float) -> Step:
    """The two ends disagree: open again from our text. At once the first time; without
    feedback since, after a pause."""
    if state.setbacks == 0:
        return _open(replace(state, setbacks=1), now_ms)
    return _retreat(state, why, leave=False)


def _retreat(state: EdgeState, why: str, leave: bool = True) -> Step:
    """Look for a worker again; the more attempts have failed, the longer it waits."""
    if state.phase is Phase.SEEKING:
        return state, ()
    pause_ms = pause_before(state.setbacks)
    return _seek(replace(state, setbacks=state.setbacks + 1), why, pause_ms, leave)


# --- drafting ---------------------------------------------------------------------------------


def _draft_more(state: EdgeState, now_ms: float) -> Step:
    """Ask for the tokens the flow allows now, never beyond the end of the answer."""
    if state.drafting or state.phase not in (Phase.OPENING, Phase.RUNNING):
        return state, ()
    flow = state.flow
    if state.in_flight and (flow.awaits or state.in_flight[-1].message.awaits):
        return state, ()
    room = min(flow.budget, state.num_remaining) - len(state.drafted)
    count = min(flow.message, room)
    if count <= 0 or (state.drafted and state.drafted[-1] in state.eos):
        return state, ()
    feed = (state.tokens + state.drafted)[state.num_cached :]
    state = replace(
        state, job=state.job + 1, drafting=True, job_awaits=flow.awaits, issued_ms=now_ms
    )
    return state, (Draft(state.job, feed, count),)


def _drafted(state: EdgeState, event: Drafted) -> Step:
    if event.job > state.job:
        raise ImpossibleEventError(f"job {event.job} has ended, {state.job} is the newest")
    if not state.drafting or event.job != state.job:
        return state, ()
    state = replace(draft_measured(state, event), drafting=False, num_cached=event.num_cached)
    if not event.tokens:
        return _draft_more(state, event.now_ms)
    return _send_window(state, event)


def _send_window(state: EdgeState, event: Drafted) -> Step:
    message = window(state, event)
    running = state.phase is Phase.RUNNING
    flight = InFlight(
        message=message,
        drafted_ms=event.now_ms - event.draft_ms,
        sent_ms=event.now_ms,
        num_sends=1 if running else 0,
    )
    state = replace(
        state,
        drafted=state.drafted + event.tokens,
        in_flight=(*state.in_flight, flight),
        next_seq=state.next_seq + 1,
    )
    sends: tuple[Effect, ...] = (Send(message),) if running else ()
    state, more = _draft_more(state, event.now_ms)
    return state, sends + more


# --- feedback ---------------------------------------------------------------------------------


def _feedback(state: EdgeState, feedback: Feedback, now_ms: float) -> Step:
    if state.phase is not Phase.RUNNING or feedback.incarnation != state.incarnation:
        return state, ()
    if feedback.outcome is Outcome.UNKNOWN_SESSION:
        return _start_over(state, "the cloud worker does not know the session", now_ms)
    index = next((i for i, f in enumerate(state.in_flight) if f.message.seq == feedback.seq), None)
    if feedback.epoch != state.epoch or index is None or feedback.outcome is Outcome.STALE:
        return state, ()
    num_before = sum(flight.message.num_tokens for flight in state.in_flight[:index])
    num_accepted = num_before + feedback.num_accepted
    if not fits(feedback, state.in_flight[index].message, len(state.tokens) + num_accepted):
        return _start_over(state, "the cloud worker's feedback does not fit our text", now_ms)
    return _judged(state, feedback, index, num_accepted, now_ms)


def _judged(
    state: EdgeState, feedback: Feedback, index: int, num_accepted: int, now_ms: float
) -> Step:
    """Apply the feedback on window `index`; windows before it were accepted in full."""
    flight = state.in_flight[index]
    rolled_back = feedback.outcome is not Outcome.ACCEPTED
    verified = len(state.tokens) + num_accepted
    next_token = () if feedback.next_token is None else (feedback.next_token,)
    new = state.until_end(state.drafted[:num_accepted] + next_token)
    commit = Commit(
        start=state.num_generated,
        tokens=new,
        accepted=tuple(i < num_accepted for i in range(len(new))),
    )
    facts = WindowJudged(
        feedback=feedback,
        num_drafted=flight.message.num_tokens,
        num_committed=len(new),
        rolled_back=rolled_back,
        window=state.control.window,
        credit=state.control.credit,
        budget=state.flow.budget,
        in_flight=len(state.drafted),
        draft_ms=flight.message.draft_ms,
        rtt_ms=rtt_of(flight, feedback, now_ms),
        at_ms=now_ms,
    )
    state = feedback_measured(state, flight, feedback, num_accepted, now_ms)
    state = replace(
        state,
        tokens=state.tokens + new,
        drafted=() if rolled_back else state.drafted[num_accepted:],
        in_flight=() if rolled_back else state.in_flight[index + 1 :],
        epoch=state.epoch + 1 if rolled_back else state.epoch,
        next_seq=flight.message.seq + 1 if rolled_back else state.next_seq,
        drafting=state.drafting and not rolled_back,
        setbacks=0,
        failures=0,
    )
    effects: tuple[Effect, ...] = (commit, facts)
    if rolled_back:
        state = replace(state, num_cached=min(state.num_cached, verified))
        effects += (Crop(state.num_cached),)
    if (reason := state.end_reached()) is not None:
        state, more = _finish(state, reason)
    else:
        state, more = _draft_more(with_flow(state), now_ms)
    return state, effects + more


# --- time and trouble -------------------------------------------------------------------------


def _tick(state: EdgeState, now_ms: float) -> Step:
    match state.phase:
        case Phase.OPENING if now_ms - state.open_sent_ms >= state.timer.timeout_ms(
            state.opens_sent
        ):
            if state.opens_sent >= GIVE_UP_AFTER_SENDS:
                return _seek(state, "the cloud worker does not answer")
            checks = _check(state.opens_sent)
            state, effects = _send_open(state, now_ms)
            return state, effects + checks
        case Phase.RUNNING if state.in_flight:
            return _resend(state, now_ms)
        case _:
            return state, ()


def _resend(state: EdgeState, now_ms: float) -> Step:
    """Send the oldest window again when it is overdue; later ones wait for it anyway."""
    oldest = state.in_flight[0]
    since_ms = max(oldest.sent_ms, state.heard_ms or 0.0)  # an answer restarts it (RFC 6298 5.3)
    if now_ms - since_ms < state.timer.timeout_ms(oldest.num_sends):
        return state, ()
    if oldest.num_sends >= GIVE_UP_AFTER_SENDS:
        return _seek(state, "the cloud worker does not answer")
    again = replace(oldest, sent_ms=now_ms, num_sends=oldest.num_sends + 1)
    state = replace(state, in_flight=(again, *state.in_flight[1:]))
    return state, (Send(again.message), *_check(oldest.num_sends))


def _check(num_sends: int) -> tuple[Effect, ...]:
    return (CheckPeer(),) if num_sends >= CHECK_PEER_AFTER_SENDS else ()


def _fault(state: EdgeState, fault: Fault, now_ms: float) -> Step:
    why = f"{fault.code}: {fault.detail}"
    if fault.code is FaultCode.OVERLOADED:
        return _retreat(replace(state, unused=state.phase is Phase.OPENING), why)
    if fault.code in CURABLE and state.phase is Phase.SEEKING:  # a repeated fault
        return state, ()
    if fault.code not in CURABLE or state.failures + 1 >= GIVE_UP_AFTER_FAILURES:
        return _finish(state, FinishReason.ERROR, why)
    state = replace(state, failures=state.failures + 1)
    if fault.code is FaultCode.OUT_OF_ORDER:
        return _start_over(state, why, now_ms)
    return _retreat(state, why)


def _finish(state: EdgeState, reason: FinishReason, error: str = "") -> Step:
    opened = state.incarnation > 0 and state.opens_sent > 0
    close = CloseSession(
        session=state.spec.session, incarnation=state.incarnation, reason=str(reason)
    )
    effects: tuple[Effect, ...] = (Send(close),) if opened else ()
    state = replace(state, phase=Phase.FINISHED, in_flight=(), drafted=(), drafting=False)
    return state, (*effects, Finish(reason, error))
