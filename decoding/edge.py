"""One session at the edge, as a pure state machine: `step(state, event) → (state, effects)`.

    stage      event              next       effects
    ---------  -----------------  ---------  -------------------------------------------------
    (begin)                       SEEKING    SeekPeer
    SEEKING    Started            OPENING    Send OpenSession; Draft the first window meanwhile
    OPENING    Opened             RUNNING    Send the windows that wait, or were in flight
    OPENING    Tick, overdue      OPENING    Send OpenSession again; CheckPeer when it drags on
    OPENING,   Drafted            same       Send the window (RUNNING), or keep it (OPENING)
      RUNNING
    RUNNING    FeedbackArrived    RUNNING    Commit; Crop where the text goes another way than the
                                             draft; Draft what the pace allows; Ack now and then
               … after a gap      RUNNING    Send Ack, asking for what is missing
               … end reached      FINISHED   Commit, Send CloseSession, Finish
    RUNNING    Tick, overdue      RUNNING    ask: Send Ack, or the oldest window again where the
                                             target waits for it; CheckPeer when it drags on
    OPENING,   PeerLost           SEEKING    SeekPeer
      RUNNING  FaultArrived
               … unknown session  OPENING    Send OpenSession with a higher incarnation;
                                             SEEKING, SeekPeer where that has failed before
               … full, failed, …  SEEKING    SeekPeer, after a pause that grows
               … cannot be helped FINISHED   Send CloseSession, Finish with the reason
    any        Ended, StopMatched FINISHED   Send CloseSession, Finish
               Rebased            OPENING    Crop, Send OpenSession with a higher incarnation

The edge owns the truth about committed tokens: `tokens` only grows, and by `Commit` alone; but for
a session whose text is another one's drafts (`Rebased`). Feedback
brings text; what of it had been drafted, the edge sees by its own drafts. A window names the text
it follows, so those in flight survive a move to another cloud worker, and none is ever taken back:
drafts that the text has turned away from never match.

This module knows no clock, no socket and no model: times come with events, work goes out as
effects, run in order. An event that cannot happen raises `ImpossibleEventError`; what merely comes
late or twice changes nothing.
"""

from __future__ import annotations

from msgspec.structs import replace

from bus.protocol.errors import ImpossibleEventError
from bus.protocol.messages import CloseSession, Fault, FaultCode, Feedback, FinishReason
from decoding import token_scores
from decoding.edge_branches import Rescue, rescue, turned, without_passed
from decoding.edge_drafting import draft_more, drafted, learnt
from decoding.edge_events import (
    CheckPeer,
    Commit,
    ControlArrived,
    Crop,
    Drafted,
    Effect,
    Ended,
    Event,
    FaultArrived,
    FeedbackArrived,
    Finish,
    Opened,
    PeerLost,
    Read,
    Rebased,
    SeekPeer,
    Send,
    Started,
    StopMatched,
    Tick,
)
from decoding.edge_flow import (
    Decided,
    decided,
    feedback_measured,
    judged_windows,
    text_measured,
    tree_accepted,
    with_flow,
)
from decoding.edge_inner import rebased
from decoding.edge_messages import acknowledged, opening, sent_windows
from decoding.edge_state import (
    MAX_INCARNATION,
    Control,
    EdgeState,
    Finished,
    InFlight,
    Opening,
    Running,
    Seeking,
    SessionSpec,
    Stage,
    Step,
)
from decoding.prefix_hash import extended, prompt_hash
from decoding.timing import opening_timeout_ms, pause_before
from decoding.token_rows import carried
from decoding.token_scores import TokenScore

__all__ = [
    "CHECK_PEER_AFTER_SENDS", "CURABLE", "GIVE_UP_AFTER_FAILURES", "GIVE_UP_AFTER_SENDS",
    "MAX_INCARNATION", "Control", "EdgeState", "Finished", "InFlight", "Opening", "Running",
    "Seeking", "SessionSpec", "Stage", "Step", "begin", "step",
]  # fmt: skip

CHECK_PEER_AFTER_SENDS = 3
"""Sends without an answer after which the peer is looked up in the registry [ours]."""
GIVE_UP_AFTER_SENDS = 12
"""Sends without an answer after which even a registered peer counts as lost [ours]."""
GIVE_UP_AFTER_FAILURES = 4
"""Failures of cloud workers, without feedback in between, that end the session [ours]."""
ACK_MS = 100.0
"""An edge acknowledges its text at least so often, where the target goes on by itself [ours]."""
CURABLE = frozenset(
    (FaultCode.UNKNOWN_SESSION, FaultCode.MODEL_FAILED, FaultCode.STALE_INCARNATION)
)
"""Faults after which the session may well go on, here or elsewhere."""


def begin(
    spec: SessionSpec,
    control: Control,
    committed: tuple[int, ...] = (),
    incarnation: int = 0,
    last_incarnation: int = MAX_INCARNATION,
) -> Step:
    """A new session, or one taken over with tokens already promised to its user. Others may have
    used incarnations up to `incarnation`; those above `last_incarnation` are its successors'."""
    text_hash = extended(prompt_hash(spec.prompt), committed)
    state = with_flow(
        EdgeState(
            spec=spec,
            control=control,
            stage=Seeking(),
            incarnation=incarnation,
            last_incarnation=last_incarnation,
            tokens=spec.prompt + committed,
            text_hash=text_hash,
            draft_hash=text_hash,
            rows=(None,) * (len(spec.prompt + committed) if spec.rows else 0),
        ),
        0.0,
    )
    return state, (SeekPeer("new session"),)


def step(state: EdgeState, event: Event) -> Step:
    """Advance one session by one event."""
    if isinstance(state.stage, Finished) and not isinstance(event, Rebased):
        return state, ()
    match event:
        case Started(eos, now_ms, measures):
            if not isinstance(state.stage, Seeking):
                raise ImpossibleEventError(f"a worker was found in stage {state.stage.name}")
            if measures is not None and not state.measures.known:
                state = with_flow(replace(state, measures=measures), now_ms)
            state = replace(state, eos=frozenset() if state.spec.ignore_eos else eos)
            reason = state.end_reached()  # a session taken over may have been at its end
            return _open(state, now_ms) if reason is None else _finish(state, reason)
        case Opened(message, now_ms):
            return _opened(state, message.incarnation, message.handle, now_ms)
        case Drafted():
            return drafted(state, event)
        case FeedbackArrived(message, now_ms):
            return _feedback(state, message, now_ms)
        case ControlArrived(message, now_ms):
            control = state.control.updated(message, now_ms)
            return with_flow(replace(state, control=control), now_ms), ()
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
        case Rebased(now_ms=now_ms):
            return _rebased(state, event, now_ms)
        case Read(length, now_ms):
            return _acknowledge(replace(state, read=length), now_ms)
        case Ended(reason, error):
            return _finish(state, reason, error)


# --- opening ----------------------------------------------------------------------------------


def _open(state: EdgeState, now_ms: float) -> Step:
    """Open, or open again, under the next incarnation; windows in flight move along, branches do
    not. One that was refused before a window went out under it is used again."""
    incarnation = state.incarnation + (0 if state.unused else 1)
    if incarnation > state.last_incarnation:
        why = f"no cloud worker kept the session, after {incarnation} incarnations; submit it again"
        return _finish(state, FinishReason.ERROR, why)
    state = replace(
        state, stage=Opening(), incarnation=incarnation, unused=False, sent=(), branches=()
    )
    state, effects = _send_open(state, Opening(), now_ms)
    state, more = draft_more(state, now_ms)
    return state, effects + more


def _send_open(state: EdgeState, stage: Opening, now_ms: float) -> Step:
    stage = Opening(stage.num_sends + 1, now_ms)
    return replace(state, stage=stage), (Send(opening(state)),)


def _opened(state: EdgeState, incarnation: int, handle: int, now_ms: float) -> Step:
    if not isinstance(state.stage, Opening) or incarnation != state.incarnation:
        return state, ()
    state = replace(state, stage=Running(handle, waits_ms=now_ms, acked_ms=now_ms))
    state, sends = sent_windows(state, state.in_flight, now_ms)
    if state.spec.method.sends_threshold:
        state, sends = acknowledged(state, now_ms, again=False)
    state, more = draft_more(state, now_ms)
    return state, sends + more


def _rebased(state: EdgeState, event: Rebased, now_ms: float) -> Step:
    """The text is another: open again from it, where it is known where; at its end there is nothing
    to open for."""
    over = isinstance(state.stage, Finished)
    state, effects = rebased(state, event)
    if isinstance(state.stage, Seeking):
        return state, effects
    reason = state.end_reached()
    if reason is not None:
        state, more = (state, ()) if over else _finish(state, reason)
    else:
        state, more = _open(state, now_ms)
    return state, effects + more


def _seek(state: EdgeState, why: str, pause_ms: float = 0.0, leave: bool = True) -> Step:
    if isinstance(state.stage, Seeking):
        return state, ()
    return replace(state, stage=Seeking()), (SeekPeer(why, pause_ms, leave),)


def _start_over(state: EdgeState, why: str, now_ms: float) -> Step:
    """The two ends disagree: open again from our text. At once the first time; without
    feedback since, after a pause."""
    if state.setbacks == 0:
        return _open(replace(state, setbacks=1), now_ms)
    return _retreat(state, why, leave=False)


def _retreat(state: EdgeState, why: str, leave: bool = True) -> Step:
    """Look for a worker again; the more attempts have failed, the longer it waits."""
    if isinstance(state.stage, Seeking):
        return state, ()
    pause_ms = pause_before(state.setbacks)
    return _seek(replace(state, setbacks=state.setbacks + 1), why, pause_ms, leave)


# --- feedback ---------------------------------------------------------------------------------


def _feedback(state: EdgeState, feedback: Feedback, now_ms: float) -> Step:
    stage = state.stage
    if not isinstance(stage, Running) or feedback.handle != stage.handle:
        return state, ()
    state = feedback_measured(state, feedback, now_ms)
    if feedback.start > len(state.tokens) or _without_scores(state, feedback):
        return _gap(state, stage, now_ms)
    stage = replace(stage, heard_ms=now_ms, waits_ms=now_ms, num_asks=0)
    state = replace(state, stage=stage, setbacks=0, failures=0)
    tokens = feedback.token_ids
    known = state.tokens[feedback.start :]
    if any(ours != theirs for ours, theirs in zip(known, tokens, strict=False)):
        return _start_over(state, "the cloud worker's text is not ours", now_ms)
    new = state.until_end(tokens[len(known) :])
    return _extended(state, feedback, new, now_ms) if new else (state, ())


def _without_scores(state: EdgeState, feedback: Feedback) -> bool:
    """Whether it lacks log-probabilities that are wanted; text that is sent again has them."""
    if state.spec.logprobs is None or not feedback.tokens:
        return False
    first = state.spec.prompt_logprobs and not state.num_generated
    return feedback.scores is None or (first and feedback.prompt_scores is None)


def _gap(state: EdgeState, stage: Running, now_ms: float) -> Step:
    """Feedback was lost: ask for what is missing, once a round trip."""
    if now_ms - stage.waits_ms < state.rtt_ms and stage.num_asks:
        return state, ()
    stage = replace(stage, waits_ms=now_ms, num_asks=stage.num_asks + 1)
    return acknowledged(replace(state, stage=stage), now_ms, again=True)


def _extended(state: EdgeState, feedback: Feedback, new: tuple[int, ...], now_ms: float) -> Step:
    """The text goes on with `new`: where it turns to a branch, up to that first."""
    text = decided(state, new)
    found = rescue(state, text)
    rest = () if found is None else new[text.agreed + 1 :]
    if rest:
        text = decided(state, new[: text.agreed + 1])
    state, effects = _committed(state, feedback, text, found, now_ms)
    if rest:
        state, more = _extended(state, replace(feedback, pass_tokens=0), rest, now_ms)
        return state, effects + more
    if (reason := state.end_reached()) is not None:
        state, more = _finish(state, reason)
        return state, effects + more
    state, more = draft_more(with_flow(state, now_ms), now_ms)
    state, acks = _acknowledge(state, now_ms)
    return state, effects + more + acks


def _committed(
    state: EdgeState, feedback: Feedback, text: Decided, found: Rescue | None, now_ms: float
) -> Step:
    """With new text, and what it makes of drafts."""
    new, before = text.new, state
    facts = judged_windows(state, text, feedback, now_ms, found is not None)
    state = text_measured(state, text, facts, now_ms)
    num_drafted = max(text.agreed, tree_accepted(before, text, feedback))
    commit = Commit(
        state.num_generated, new, tuple(i < num_drafted for i in range(len(new))),
        token_scores.carried(feedback, len(state.tokens), len(new)),
        _prompt_scores(state, feedback),
    )  # fmt: skip
    beyond = text.rejected or len(new) >= len(state.drafted)
    text_hash = extended(state.text_hash, new)
    rows = carried(feedback, len(state.tokens), len(new)) if state.spec.rows else ()
    state = replace(state, tokens=state.tokens + new, text_hash=text_hash, rows=state.rows + rows)
    effects: tuple[Effect, ...] = (commit, *facts, *learnt(before, feedback, len(new)))
    if not text.rejected:
        numbers = {fact.number for fact in facts}
        state = replace(
            state,
            drafted=() if beyond else state.drafted[len(new) :],
            doubts=state.doubts[len(new) :],
            draft_hash=text_hash if beyond else state.draft_hash,
            in_flight=tuple(f for f in state.in_flight if f.number not in numbers),
        )
        return without_passed(state), effects
    good = len(before.tokens) + text.agreed
    state = turned(state, found)
    state = replace(state, num_cached=min(state.num_cached, good))
    if state.job is None:
        effects += (Crop(state.num_cached),)
    return state, effects


def _prompt_scores(state: EdgeState, feedback: Feedback) -> tuple[TokenScore, ...]:
    """Of the prompt, with the first tokens of the answer."""
    if state.num_generated or feedback.prompt_scores is None:
        return ()
    return token_scores.parted(feedback.prompt_scores)


def _acknowledge(state: EdgeState, now_ms: float) -> Step:
    """Renew the lease of a target that goes on by itself, where no window has done so lately."""
    stage = state.stage
    if not isinstance(stage, Running) or not state.spec.method.runs_on:
        return state, ()
    if now_ms - stage.acked_ms < ACK_MS:
        return state, ()
    return acknowledged(state, now_ms, again=False)


# --- time and trouble -------------------------------------------------------------------------


def _tick(state: EdgeState, now_ms: float) -> Step:
    match state.stage:
        case Opening() as stage if now_ms - stage.sent_ms >= opening_timeout_ms(stage.num_sends):
            if stage.num_sends >= GIVE_UP_AFTER_SENDS:
                return _seek(state, "the cloud worker does not answer")
            state, effects = _send_open(state, stage, now_ms)
            return state, effects + _check(stage.num_sends)
        case Running() as stage if state.in_flight or state.spec.method.runs_on:
            return _ask(state, stage, now_ms)
        case _:
            return state, ()


def _ask(state: EdgeState, stage: Running, now_ms: float) -> Step:
    """Nothing has come for too long: say what has; a target that waits gets the oldest window
    again, in case that was lost."""
    if now_ms - stage.waits_ms < state.timer.timeout_ms(stage.num_asks + 1):
        return state, ()
    if stage.num_asks + 1 >= GIVE_UP_AFTER_SENDS:
        return _seek(state, "the cloud worker does not answer")
    asked = replace(stage, waits_ms=now_ms, num_asks=stage.num_asks + 1)
    state = replace(state, stage=asked)
    if state.spec.method.runs_on:
        state, effects = acknowledged(state, now_ms, again=True)
    else:
        state, effects = sent_windows(state, state.in_flight[:1], now_ms)
    return state, effects + _check(asked.num_asks)


def _check(num_sends: int) -> tuple[Effect, ...]:
    return (CheckPeer(),) if num_sends >= CHECK_PEER_AFTER_SENDS else ()


def _fault(state: EdgeState, fault: Fault, now_ms: float) -> Step:
    why = f"{fault.code}: {fault.detail}"
    if fault.code is FaultCode.OVERLOADED:
        return _retreat(replace(state, unused=isinstance(state.stage, Opening)), why)
    if fault.code is FaultCode.UNKNOWN_SESSION:
        known = isinstance(state.stage, Running) and fault.handle == state.stage.handle
        return _start_over(state, why, now_ms) if known else (state, ())
    if fault.code in CURABLE and isinstance(state.stage, Seeking):  # a repeated fault
        return state, ()
    if fault.code not in CURABLE or state.failures + 1 >= GIVE_UP_AFTER_FAILURES:
        return _finish(state, FinishReason.ERROR, why)
    return _retreat(replace(state, failures=state.failures + 1), why)


def _finish(state: EdgeState, reason: FinishReason, error: str = "") -> Step:
    stage = state.stage
    opened = state.incarnation > 0 and not (isinstance(stage, Opening) and not stage.num_sends)
    close = CloseSession(
        session=state.spec.session, incarnation=state.incarnation, reason=str(reason)
    )
    effects: tuple[Effect, ...] = (Send(close),) if opened else ()
    state = replace(
        state, stage=Finished(), in_flight=(), drafted=(), doubts=(), branches=(), job=None
    )
    return state, (*effects, Finish(reason, error))
