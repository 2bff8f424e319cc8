"""The edge's machine and the faults that a cloud worker sends it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from bus.protocol.errors import ImpossibleEventError
from bus.protocol.messages import (
    CloseSession,
    FaultCode,
    FinishReason,
    OpenSession,
    SessionReady,
)
from decoding import edge
from decoding.edge import Phase
from decoding.edge_events import (
    Event,
    FeedbackArrived,
    Finish,
    Opened,
    PeerLost,
    SeekPeer,
    Send,
    StopMatched,
)
from tests.decoding.edge_session import (
    ALL_ACCEPTED,
    OPEN,
    SPEC,
    START,
    UNKNOWN,
    Edge,
    drafted,
    fault,
    opening,
    running,
    waiting,
)

# --- FaultArrived -----------------------------------------------------------------------------


def test_out_of_order_starts_over_from_our_text() -> None:
    effects = waiting().tell(fault(FaultCode.OUT_OF_ORDER))
    assert effects == (Send(msgspec.structs.replace(OPEN, incarnation=2)),)


@pytest.mark.parametrize("session", [opening, running, waiting])
@pytest.mark.parametrize(
    "code", [FaultCode.OVERLOADED, *sorted(edge.CURABLE - {FaultCode.OUT_OF_ORDER})]
)
def test_a_worker_that_is_full_or_fails_is_left_for_another(session: Any, code: FaultCode) -> None:
    told = session()
    assert told.tell(fault(code)) == (SeekPeer(f"{code.value}: why", 100.0),)
    assert told.tell(fault(code)) == ()


def opens(session: Edge) -> list[OpenSession]:
    """What goes out once a worker is found."""
    return [
        effect.message
        for effect in session.tell(START)
        if isinstance(effect, Send) and isinstance(effect.message, OpenSession)
    ]


@pytest.mark.parametrize(
    "refusal",
    [
        fault(FaultCode.OVERLOADED),
        fault(FaultCode.OUT_OF_ORDER),
        FeedbackArrived(UNKNOWN, 30.0),
        FeedbackArrived(msgspec.structs.replace(ALL_ACCEPTED, committed_length=99), 30.0),
    ],
    ids=["overloaded", "out_of_order", "unknown_session", "misfit"],
)
def test_each_refusal_without_feedback_between_makes_the_pause_longer(refusal: Event) -> None:
    """The first misunderstanding is put right at once; from then on a worker is not hammered."""
    session, pauses = waiting(), []
    for _ in range(9):
        state = session.state
        if isinstance(refusal, FeedbackArrived):
            message = msgspec.structs.replace(refusal.message, incarnation=state.incarnation)
            refusal = FeedbackArrived(message, 30.0)
        pauses += [e.pause_ms for e in session.tell(refusal) if isinstance(e, SeekPeer)]
        if session.state.phase is Phase.FINISHED:
            break
        if session.state.phase is Phase.SEEKING:
            session.tell(START)
        session.tell(Opened(SessionReady("s1", session.state.incarnation, "cloud-1"), 30.0))
    assert pauses == sorted(pauses)
    assert all(p == min(2 * q, 2000.0) for q, p in pairwise(pauses))
    assert pauses[0] == (100.0 if refusal == fault(FaultCode.OVERLOADED) else 200.0)


def test_feedback_makes_the_next_pause_short_again() -> None:
    session = waiting()
    for _ in range(2):
        session.tell(fault(FaultCode.OVERLOADED))
        session.tell(START)
    session.tell(Opened(SessionReady("s1", session.state.incarnation, "cloud-1"), 30.0))
    accepted = msgspec.structs.replace(ALL_ACCEPTED, incarnation=session.state.incarnation)
    session.tell(FeedbackArrived(accepted, 40.0))
    assert session.tell(fault(FaultCode.OVERLOADED)) == (SeekPeer("overloaded: why", 100.0),)


def test_an_incarnation_refused_before_any_window_is_used_again() -> None:
    """Waiting for a place uses none up: the bound of one owner is for real reopenings."""
    session = opening()
    first = session.state.incarnation
    for _ in range(50):
        session.tell(fault(FaultCode.OVERLOADED))
        assert [message.incarnation for message in opens(session)] == [first]
    session.tell(Opened(SessionReady("s1", first, "cloud-1"), 30.0))
    session.tell(fault(FaultCode.OVERLOADED))  # the worker leaves
    assert [message.incarnation for message in opens(session)] == [first + 1]


def test_no_incarnation_of_a_successor_is_ever_used() -> None:
    spec = replace(SPEC, max_new_tokens=50)
    session = Edge(spec, incarnation=8, last_incarnation=10)
    assert [m.incarnation for m in opens(session)] == [9]
    session.tell(PeerLost(1.0))
    assert [m.incarnation for m in opens(session)] == [10]
    session.tell(PeerLost(1.0))
    *_, last = session.tell(START)
    assert isinstance(last, Finish)
    assert last.reason is FinishReason.ERROR
    assert "no cloud worker kept the session" in last.error


@pytest.mark.parametrize("code", sorted(edge.CURABLE))
def test_a_prompt_that_fails_everywhere_ends_with_the_reason(code: FaultCode) -> None:
    session = waiting()
    for _ in range(edge.GIVE_UP_AFTER_FAILURES - 1):
        session.tell(fault(code))
        assert session.state.phase is not Phase.FINISHED
        if session.state.phase is Phase.SEEKING:
            session.tell(START)
        session.tell(Opened(SessionReady("s1", session.state.incarnation, "cloud-1"), 30.0))
    *_, last = session.tell(fault(code))
    assert last == Finish(FinishReason.ERROR, f"{code.value}: why")


@pytest.mark.parametrize(
    ("session", "event"),
    [
        (running, START),
        (running, drafted(99, 3, (10, 11))),
        (waiting, StopMatched(99)),
    ],
)
def test_what_cannot_happen_is_an_error_and_changes_nothing(session: Any, event: Event) -> None:
    told = session()
    before = told.state
    with pytest.raises(ImpossibleEventError):
        told.tell(event)
    assert told.state == before


@pytest.mark.parametrize(
    "code", sorted(set(FaultCode) - edge.CURABLE - {FaultCode.OVERLOADED}), ids=str
)
def test_what_cannot_be_helped_ends_the_session_and_says_why(code: FaultCode) -> None:
    assert waiting().tell(fault(code)) == (
        Send(CloseSession("s1", 1, "error")), Finish(FinishReason.ERROR, f"{code.value}: why"),
    )  # fmt: skip
