"""The edge's machine where something is lost, late, refused or ended; order does not matter."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bus.protocol.arrays import pack_tokens
from bus.protocol.codec import decode, encode
from bus.protocol.messages import (
    CloseSession,
    ControlUpdate,
    DraftWindow,
    Fault,
    FaultCode,
    Feedback,
    FinishReason,
    Outcome,
    SessionReady,
)
from decoding import edge
from decoding.edge import CHECK_PEER_AFTER_SENDS, GIVE_UP_AFTER_SENDS, Phase
from decoding.edge_events import (
    CheckPeer,
    Commit,
    ControlArrived,
    Draft,
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
)
from decoding.edge_state import CONTROL_TTL_MS
from decoding.timing import INITIAL_TIMEOUT_MS, MAX_TIMEOUT_MS, ReplyTimer
from tests.decoding.edge_session import (
    ALL_ACCEPTED,
    EOS,
    OPEN,
    PROMPT,
    READY,
    SAMPLED,
    SPEC,
    START,
    TWO_ACCEPTED,
    UNKNOWN,
    WINDOW,
    Edge,
    drafted,
    fault,
    feedback,
    finished,
    judged,
    opening,
    running,
    waiting,
    window,
)

# --- … unknown session ------------------------------------------------------------------------


def test_a_cloud_that_forgot_the_session_is_told_everything_again() -> None:
    """The window in flight is not drafted again: it moves to the next incarnation."""
    session = waiting().is_told(
        FeedbackArrived(TWO_ACCEPTED, 30.0), drafted(2, 6, (20, 21, 22, 23), now_ms=40.0)
    )
    unknown = msgspec.structs.replace(UNKNOWN, epoch=1, seq=1)
    reopened = msgspec.structs.replace(
        OPEN, incarnation=2, epoch=1, next_seq=1, committed=pack_tokens((10, 11, 60))
    )
    assert session.tell(FeedbackArrived(unknown, 50.0)) == (Send(reopened),)
    assert session.state.phase is Phase.OPENING
    assert session.tell(FeedbackArrived(unknown, 51.0)) == ()
    moved = window(
        6, (20, 21, 22, 23), incarnation=2, epoch=1, seq=1, edge_ms=26.0, rework_ms=3.0, rtt_ms=9.0
    )
    assert session.tell(Opened(SessionReady("s1", 2, "cloud-1"), 60.0)) == (Send(moved),)
    (flight,) = session.state.in_flight
    assert (flight.sent_ms, flight.num_sends) == (60.0, 1)


# --- RUNNING, Tick ----------------------------------------------------------------------------


def test_an_unanswered_window_is_sent_again_with_backoff_until_the_peer_is_given_up() -> None:
    session = waiting()
    now_ms = 10.0
    for number in range(1, GIVE_UP_AFTER_SENDS):
        timeout_ms = min(INITIAL_TIMEOUT_MS * 2 ** (number - 1), MAX_TIMEOUT_MS)
        assert session.tell(Tick(now_ms + timeout_ms - 0.001)) == ()
        now_ms += timeout_ms
        check = (CheckPeer(),) if number >= CHECK_PEER_AFTER_SENDS else ()
        assert session.tell(Tick(now_ms)) == (Send(WINDOW), *check)
    effects = session.tell(Tick(now_ms + MAX_TIMEOUT_MS))
    assert effects == (SeekPeer("the cloud worker does not answer"),)


def test_with_nothing_in_flight_time_may_pass() -> None:
    assert running().tell(Tick(1e9)) == ()


def test_the_timeout_follows_measured_replies_but_not_those_to_repeated_windows() -> None:
    session = waiting().is_told(FeedbackArrived(ALL_ACCEPTED, now_ms=310.0))
    timer = ReplyTimer().sample(300.0)
    assert session.state.timer == timer
    session.is_told(drafted(2, 8, (20, 21, 22, 23), now_ms=400.0))
    assert session.tell(Tick(400.0 + timer.timeout_ms(1) - 0.001)) == ()
    assert len(session.tell(Tick(400.0 + timer.timeout_ms(1)))) == 1
    again = feedback(Outcome.ACCEPTED, 4, 13, 51, seq=1)
    session.is_told(FeedbackArrived(again, now_ms=5000.0))
    assert session.state.timer == timer.answered_late(2)  # to which send was that the reply?


# --- PeerLost ---------------------------------------------------------------------------------


@pytest.mark.parametrize("session", [opening, running, waiting])
def test_a_lost_peer_is_replaced(session: Any) -> None:
    told = session()
    assert told.tell(PeerLost(20.0)) == (SeekPeer("the cloud worker is gone"),)
    assert told.state.phase is Phase.SEEKING
    assert told.tell(PeerLost(20.0)) == ()


@pytest.mark.parametrize("message", [ALL_ACCEPTED, TWO_ACCEPTED, UNKNOWN])
def test_while_a_peer_is_sought_the_one_that_is_gone_is_not_listened_to(message: Feedback) -> None:
    session = waiting().is_told(PeerLost(20.0))
    before = session.state
    assert session.tell(FeedbackArrived(message, 25.0)) == ()
    assert session.state == before


def test_a_window_in_flight_survives_the_move_to_another_worker() -> None:
    session = waiting().is_told(PeerLost(20.0))
    reopened = msgspec.structs.replace(OPEN, incarnation=2)
    assert session.tell(Started(frozenset({EOS}), 30.0)) == (Send(reopened),)
    moved = window(3, (10, 11, 12, 13), incarnation=2)
    assert session.tell(Opened(SessionReady("s1", 2, "cloud-2"), 40.0)) == (Send(moved),)
    late = feedback(Outcome.PARTIAL, 0, 4, 77)  # of the worker before
    assert session.tell(FeedbackArrived(late, 45.0)) == ()
    accepted = feedback(Outcome.ACCEPTED, 4, 8, 50, incarnation=2)
    assert session.tell(FeedbackArrived(accepted, 61.0))[0] == Commit(
        0, (10, 11, 12, 13, 50), (True, True, True, True, False)
    )


def test_a_window_that_was_being_drafted_while_the_peer_was_lost_is_used() -> None:
    session = running().is_told(PeerLost(6.0))
    assert session.tell(drafted(1, 3, (10, 11, 12, 13))) == ()
    session.is_told(Started(frozenset({EOS}), 30.0))
    moved = window(3, (10, 11, 12, 13), incarnation=2)
    assert session.tell(Opened(SessionReady("s1", 2, "cloud-2"), 40.0)) == (Send(moved),)


# --- Ended, StopMatched -----------------------------------------------------------------------


@pytest.mark.parametrize("session", [opening, running, waiting])
@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.ERROR])
def test_whoever_ends_it_closes_it_on_the_other_side_too(
    session: Any, reason: FinishReason
) -> None:
    told = session()
    assert told.tell(Ended(reason, "why")) == (
        Send(CloseSession("s1", 1, reason.value)), Finish(reason, "why"),
    )  # fmt: skip
    assert told.state.phase is Phase.FINISHED


def test_nothing_is_closed_that_was_never_opened() -> None:
    assert Edge().tell(Ended(FinishReason.CANCELLED)) == (Finish(FinishReason.CANCELLED),)


def test_a_stop_string_cuts_the_text_behind_the_token_that_completed_it() -> None:
    session = waiting().is_told(FeedbackArrived(ALL_ACCEPTED, 30.0))
    assert session.tell(StopMatched(num_generated=2)) == (
        Send(CloseSession("s1", 1, "stop")), Finish(FinishReason.STOP),
    )  # fmt: skip
    assert session.state.tokens == (1, 2, 3, 10, 11)


@pytest.mark.parametrize(
    "event",
    [
        START,
        READY,
        drafted(1, 3, (10, 11)),
        FeedbackArrived(ALL_ACCEPTED, 30.0),
        FeedbackArrived(UNKNOWN, 30.0),
        ControlArrived(ControlUpdate("s1", 1, 1, 0.1, 4, 0.0, 0.0), 30.0),
        FaultArrived(Fault("s1", FaultCode.OVERLOADED, ""), 30.0),
        Tick(1e9),
        PeerLost(30.0),
        StopMatched(1),
        Ended(FinishReason.ERROR),
    ],
    ids=lambda event: type(event).__name__,
)
def test_after_the_end_nothing_happens(event: Event) -> None:
    session = finished()
    before = session.state
    assert session.tell(event) == ()
    assert session.state == before


# --- ControlArrived ---------------------------------------------------------------------------


def update(term: int, version: int, threshold: float, window: int = 4) -> ControlUpdate:
    return ControlUpdate("s1", term, version, threshold, window, 0.5, 0.0)


def sent_window(session: Edge, now_ms: float) -> DraftWindow:
    (send,) = session.tell(drafted(1, 3, (10, 11, 12, 13), now_ms))
    assert isinstance(send, Send)
    assert isinstance(send.message, DraftWindow)
    return send.message


def test_an_update_sets_threshold_window_and_version_from_the_next_window_on() -> None:
    session = running()
    assert session.tell(ControlArrived(update(1, 7, 0.1, window=6), 6.0)) == ()
    sent = sent_window(session, now_ms=10.0)
    assert (sent.threshold, sent.control_version) == (0.1, 7)
    effects = session.tell(FeedbackArrived(ALL_ACCEPTED, 30.0))
    assert effects[1:] == (
        judged(ALL_ACCEPTED, num_committed=5, window=6, credit=0.5, budget=6),
        Draft(2, (13, 50), 6),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("term", "version", "taken"),
    [(2, 5, True), (2, 6, True), (3, 1, True), (2, 4, False), (1, 99, False)],
)
def test_older_updates_are_ignored(term: int, version: int, taken: bool) -> None:
    session = running().is_told(ControlArrived(update(2, 5, 0.1), 6.0))
    session.tell(ControlArrived(update(term, version, 0.12), 7.0))
    assert session.state.control.threshold == (0.12 if taken else 0.1)
    assert session.state.control.heard_ms == (7.0 if taken else 6.0)


def test_without_a_controller_the_conservative_threshold_holds() -> None:
    assert sent_window(running(), now_ms=10.0).threshold == 0.02


@pytest.mark.parametrize(
    ("silent_ms", "expected"), [(CONTROL_TTL_MS, 0.1), (CONTROL_TTL_MS + 0.001, 0.02)]
)
def test_when_the_controller_falls_silent_the_conservative_threshold_returns(
    silent_ms: float, expected: float
) -> None:
    session = running().is_told(ControlArrived(update(1, 1, 0.1), 6.0))
    assert sent_window(session, 6.0 + silent_ms).threshold == expected


def test_a_repeated_update_proves_the_controller_alive() -> None:
    session = running().is_told(ControlArrived(update(1, 1, 0.1), 6.0))
    session.tell(ControlArrived(update(1, 1, 0.1), 6000.0))
    assert sent_window(session, 10_000.0).threshold == 0.1


def test_a_threshold_below_the_conservative_one_stays_when_the_controller_is_gone() -> None:
    session = running().is_told(ControlArrived(update(1, 1, 0.005), 6.0))
    assert sent_window(session, 1e6).threshold == 0.005


# --- anything, in any order -------------------------------------------------------------------

small = st.integers(0, 3)
any_feedback = st.builds(
    feedback, st.sampled_from(Outcome), st.integers(0, 6), st.integers(0, 12),
    st.none() | st.sampled_from([50, EOS]), incarnation=small, epoch=small, seq=small,
)  # fmt: skip
any_event: st.SearchStrategy[Any] = st.one_of(
    st.just(START),
    st.builds(lambda i: Opened(SessionReady("s1", i, "cloud"), 0.0), small),
    st.builds(lambda m: FeedbackArrived(m, 0.0), any_feedback),
    st.builds(fault, st.sampled_from([*sorted(edge.CURABLE), FaultCode.OVERLOADED])),
    st.builds(lambda t, v, w: ControlArrived(update(t, v, 0.1, w), 0.0), small, small,
              st.integers(1, 5)),
    st.just(Tick(1e9)),
    st.just(PeerLost(0.0)),
    st.just("drafted"),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(any_event, max_size=30), st.sampled_from([SPEC, SAMPLED]))
def test_no_order_of_events_breaks_the_text(events: list[Any], spec: edge.SessionSpec) -> None:
    """Commits append, messages are valid, and what is drafted is what is in flight."""
    session = Edge(replace(spec, max_new_tokens=8))
    answer: tuple[int, ...] = ()
    jobs: list[Draft] = []
    for happening in events:
        event = happening
        if happening == "drafted":
            if not jobs:
                continue
            job = jobs.pop()
            start = session.state.num_cached + len(job.feed)
            event = drafted(job.job, start, tuple(range(20, 20 + job.count)))
        if event is START and session.state.phase not in (Phase.SEEKING, Phase.FINISHED):
            continue
        for effect in session.tell(event):
            match effect:
                case Commit(start, tokens, accepted):
                    assert start == len(answer)
                    assert len(tokens) == len(accepted) > 0
                    answer += tokens
                case Draft():
                    assert effect.feed
                    assert effect.count > 0
                    jobs.append(effect)
                case Send(message):
                    decode(encode(message))
                case _:
                    pass
        state = session.state
        assert state.tokens == PROMPT + answer
        if state.phase is not Phase.FINISHED:
            in_flight = tuple(t for f in state.in_flight for t in f.message.token_ids)
            assert in_flight == state.drafted
            assert len(answer) < 8
