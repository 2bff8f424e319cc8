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
    DraftRows,
    Fault,
    FaultCode,
    FinishReason,
    Outcome,
)
from decoding import edge
from decoding.edge import CHECK_PEER_AFTER_SENDS, GIVE_UP_AFTER_SENDS
from decoding.edge_events import (
    CheckPeer,
    Commit,
    ControlArrived,
    Crop,
    Draft,
    Ended,
    Event,
    FaultArrived,
    Finish,
    PeerLost,
    SeekPeer,
    Send,
    Started,
    StopMatched,
    Tick,
    WindowJudged,
)
from decoding.edge_state import CONTROL_TTL_MS
from decoding.timing import INITIAL_TIMEOUT_MS, MAX_TIMEOUT_MS, ReplyTimer
from tests.decoding.edge_session import (
    AHEAD,
    ALL_ACCEPTED,
    EOS,
    OPEN,
    PROMPT,
    READY,
    RESIDUAL,
    RUNS_ON,
    SPEC,
    START,
    THIN,
    TOKENS,
    TWO_ACCEPTED,
    UNKNOWN,
    Edge,
    drafted,
    fault,
    finished,
    judged,
    opened,
    opening,
    running,
    says,
    sent,
    three_in_flight,
    waiting,
)
from tests.harness import check_in_flight
from tests.sessions import text_hash

# --- … unknown session ------------------------------------------------------------------------


def test_a_cloud_that_forgot_the_session_is_told_everything_again() -> None:
    """The window in flight is not drafted again: it moves to the next incarnation."""
    text = (*PROMPT, 10, 11, 60)
    session = waiting().is_told(TWO_ACCEPTED, drafted(2, 6, (20, 21, 22, 23), now_ms=40.0))
    reopened = msgspec.structs.replace(OPEN, incarnation=2, committed=pack_tokens((10, 11, 60)))
    assert session.tell(UNKNOWN) == (Send(reopened),)
    assert isinstance(session.state.stage, edge.Opening)
    assert session.tell(opened(2, handle=7, now_ms=60.0)) == (
        sent((20, 21, 22, 23), text, handle=7, number=2, acknowledged=6),
    )
    (flight,) = session.state.in_flight
    assert flight.num_sends == 2


# --- RUNNING, Tick ----------------------------------------------------------------------------


def test_an_unanswered_window_is_sent_again_with_backoff_until_the_peer_is_given_up() -> None:
    session = waiting()
    now_ms = 10.0
    for number in range(1, GIVE_UP_AFTER_SENDS):
        timeout_ms = min(INITIAL_TIMEOUT_MS * 2 ** (number - 1), MAX_TIMEOUT_MS)
        assert session.tell(Tick(now_ms + timeout_ms - 0.001)) == ()
        now_ms += timeout_ms
        check = (CheckPeer(),) if number >= CHECK_PEER_AFTER_SENDS else ()
        assert session.tell(Tick(now_ms)) == (sent(), *check)
    effects = session.tell(Tick(now_ms + MAX_TIMEOUT_MS))
    assert effects == (SeekPeer("the cloud worker does not answer"),)


def test_of_several_windows_the_oldest_is_sent_again() -> None:
    """The others follow it: whether they are lost shows once it is answered."""
    assert three_in_flight().tell(Tick(2000.0)) == (sent(),)


def test_a_window_sent_again_acknowledges_what_has_come_since() -> None:
    session = three_in_flight().is_told(says(3, (10, 11)))
    assert session.tell(Tick(9000.0)) == (sent(acknowledged=5),)


def test_with_nothing_in_flight_time_may_pass() -> None:
    assert running().tell(Tick(1e9)) == ()


def test_feedback_makes_patience_new() -> None:
    session = three_in_flight()
    for now_ms in (2000.0, 6000.0):
        assert session.tell(Tick(now_ms)) == (sent(),)
    session.is_told(says(3, (10,), 6500.0, number=None))
    assert session.tell(Tick(6600.0)) == ()
    assert isinstance(session.state.stage, edge.Running)
    assert (session.state.stage.num_asks, session.state.stage.waits_ms) == (0, 6500.0)


def test_the_timeout_follows_measured_replies_but_not_those_to_repeated_windows() -> None:
    session = waiting().is_told(says(3, (10, 11, 12, 13, 50), 310.0))
    timer = ReplyTimer().sample(300.0)
    assert session.state.timer == timer
    session.is_told(drafted(2, 8, (20, 21, 22, 23), now_ms=400.0))
    assert session.tell(Tick(400.0 + timer.timeout_ms(1) - 0.001)) == ()
    assert len(session.tell(Tick(400.0 + timer.timeout_ms(1)))) == 1
    session.is_told(says(8, (20,), 5000.0, number=2))
    assert session.state.timer == timer.answered_late(2)  # to which send was that the reply?


# --- PeerLost ---------------------------------------------------------------------------------


@pytest.mark.parametrize("session", [opening, running, waiting])
def test_a_lost_peer_is_replaced(session: Any) -> None:
    told = session()
    assert told.tell(PeerLost(20.0)) == (SeekPeer("the cloud worker is gone"),)
    assert told.state.stage == edge.Seeking()
    assert told.tell(PeerLost(20.0)) == ()


@pytest.mark.parametrize("event", [ALL_ACCEPTED, TWO_ACCEPTED, UNKNOWN])
def test_while_a_peer_is_sought_the_one_that_is_gone_is_not_listened_to(event: Event) -> None:
    session = waiting().is_told(PeerLost(20.0))
    before = session.state
    assert session.tell(event) == ()
    assert session.state == before


def test_a_window_in_flight_survives_the_move_to_another_worker() -> None:
    session = waiting().is_told(PeerLost(20.0))
    reopened = msgspec.structs.replace(OPEN, incarnation=2)
    assert session.tell(Started(frozenset({EOS}), 30.0)) == (Send(reopened),)
    assert session.tell(opened(2, handle=7, now_ms=40.0)) == (sent(handle=7),)
    assert session.tell(says(3, (77,), 45.0)) == ()  # of the worker before
    commit, fact, _ = session.tell(says(3, (10, 11, 12, 13, 50), 61.0, handle=7))
    assert commit == Commit(0, (10, 11, 12, 13, 50), (True, True, True, True, False))
    assert isinstance(fact, WindowJudged)
    assert (fact.incarnation, fact.rtt_ms) == (2, 0.0)  # sent twice: no measure of the path


def test_a_window_that_was_being_drafted_while_the_peer_was_lost_is_used() -> None:
    session = running().is_told(PeerLost(6.0))
    assert session.tell(drafted(1, 3, TOKENS)) == ()
    session.is_told(Started(frozenset({EOS}), 30.0))
    assert session.tell(opened(2, handle=7, now_ms=40.0)) == (sent(handle=7),)


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
    assert told.state.stage == edge.Finished()


def test_nothing_is_closed_that_was_never_opened() -> None:
    assert Edge().tell(Ended(FinishReason.CANCELLED)) == (Finish(FinishReason.CANCELLED),)


def test_a_stop_string_cuts_the_text_behind_the_token_that_completed_it() -> None:
    session = waiting().is_told(ALL_ACCEPTED)
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
        ALL_ACCEPTED,
        UNKNOWN,
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


def rows_sent(session: Edge, now_ms: float) -> DraftRows:
    session.tell(drafted(1, 3, TOKENS, now_ms))
    (message,) = session.messages
    assert message.rows is not None
    assert message.rows.threshold == session.state.in_flight[-1].threshold
    return message.rows


def test_an_update_sets_threshold_window_and_version_from_the_next_window_on() -> None:
    session = running(RESIDUAL)
    assert session.tell(ControlArrived(update(1, 7, 0.1, window=6), 6.0)) == ()
    rows = rows_sent(session, now_ms=10.0)
    assert (rows.threshold, rows.control_version) == (0.1, 7)
    assert session.tell(ALL_ACCEPTED)[1:] == (
        judged(Outcome.ACCEPTED, 4, 5, window=6, credit=0.5, budget=6, threshold=0.1),
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
    assert rows_sent(running(RESIDUAL), now_ms=10.0).threshold == 0.02


@pytest.mark.parametrize(
    ("silent_ms", "expected"), [(CONTROL_TTL_MS, 0.1), (CONTROL_TTL_MS + 0.001, 0.02)]
)
def test_when_the_controller_falls_silent_the_conservative_threshold_returns(
    silent_ms: float, expected: float
) -> None:
    session = running(RESIDUAL).is_told(ControlArrived(update(1, 1, 0.1), 6.0))
    assert rows_sent(session, 6.0 + silent_ms).threshold == expected


def test_a_repeated_update_proves_the_controller_alive() -> None:
    session = running(RESIDUAL).is_told(ControlArrived(update(1, 1, 0.1), 6.0))
    session.tell(ControlArrived(update(1, 1, 0.1), 6000.0))
    assert rows_sent(session, 10_000.0).threshold == 0.1


def test_a_threshold_below_the_conservative_one_stays_when_the_controller_is_gone() -> None:
    session = running(RESIDUAL).is_told(ControlArrived(update(1, 1, 0.005), 6.0))
    assert rows_sent(session, 1e6).threshold == 0.005


# --- anything, in any order -------------------------------------------------------------------

small = st.integers(0, 3)
texts = st.lists(st.sampled_from([20, 21, 50, EOS]), max_size=5).map(tuple)
any_event: st.SearchStrategy[Any] = st.one_of(
    st.just(START),
    st.builds(lambda i: opened(i, handle=i), small),
    st.tuples(st.just("feedback"), st.integers(-2, 2), texts, st.none() | st.integers(0, 6)),
    st.builds(lambda start, tokens, handle: says(start, tokens, handle=handle),
              st.integers(0, 12), texts, small),
    st.builds(fault, st.sampled_from([*sorted(edge.CURABLE), FaultCode.OVERLOADED]), small),
    st.builds(lambda t, v, w: ControlArrived(update(t, v, 0.1, w), 0.0), small, small,
              st.integers(1, 5)),
    st.just(Tick(1e9)),
    st.just(PeerLost(0.0)),
    st.just("drafted"),
    st.just("drafted"),
)  # fmt: skip


class AnyOrder(Edge):
    """A session with its drafter's cache; checks after each event what must hold."""

    def __init__(self, spec: edge.SessionSpec) -> None:
        super().__init__(replace(spec, max_new_tokens=8))
        self.answer: tuple[int, ...] = ()
        self.job: Draft | None = None

    def happens(self, happening: Any) -> None:
        event, state = happening, self.state
        if happening == "drafted":
            if self.job is None:
                return
            start = state.num_cached + len(self.job.feed)
            tokens = tuple(20 + i % 3 for i in range(self.job.count))
            event, self.job = drafted(self.job.job, start, tokens), None
        elif isinstance(happening, tuple):
            _, back, tokens, number = happening
            known = state.tokens[len(state.tokens) + min(back, 0) :]
            handle = getattr(state.stage, "handle", 0)
            start = len(state.tokens) + back
            event = says(start, known + tokens, handle=handle, number=number)
        if event is START and not isinstance(state.stage, edge.Seeking | edge.Finished):
            return
        for effect in self.tell(event):
            self.runs(effect)
        self.check()

    def runs(self, effect: Any) -> None:
        match effect:
            case Commit(start, tokens, accepted):
                assert start == len(self.answer)
                assert len(tokens) == len(accepted) > 0
                self.answer += tokens
            case Draft():
                assert effect.feed
                assert effect.count > 0
                assert self.state.spec.drafts
                self.job = effect
            case Crop(length):
                assert length == self.state.num_cached
                if self.state.job is None or effect is self.effects[-1]:
                    self.job = None
            case Send(message):
                assert decode(encode(message)) is not None

    def check(self) -> None:
        state = self.state
        assert state.tokens == PROMPT + self.answer
        if not isinstance(state.stage, edge.Finished):
            check_in_flight(state)
            assert len(self.answer) < 8
            assert state.draft_hash == text_hash(state.text)
            assert state.text_hash == text_hash(state.tokens)
            for flight in state.in_flight:
                assert flight.follows == text_hash(state.text[: flight.start])


@settings(max_examples=150, deadline=None)
@given(st.lists(any_event, max_size=30), st.sampled_from([SPEC, RESIDUAL, AHEAD, RUNS_ON, THIN]))
def test_no_order_of_events_breaks_the_text(events: list[Any], spec: edge.SessionSpec) -> None:
    """Commits append, messages are valid, and what is drafted is what is in flight."""
    session = AnyOrder(spec)
    for happening in [START, opened(1, 1), *events]:
        session.happens(happening)
