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
)
from decoding import edge
from decoding.edge_events import (
    Event,
    Finish,
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
    opened,
    opening,
    running,
    waiting,
)

# --- FaultArrived -----------------------------------------------------------------------------


def test_a_session_the_cloud_has_forgotten_is_opened_again_from_our_text() -> None:
    effects = waiting().tell(UNKNOWN)
    assert effects == (Send(msgspec.structs.replace(OPEN, incarnation=2)),)


@pytest.mark.parametrize("handle", [None, 0, 2])
def test_that_another_handle_is_unknown_says_nothing_of_ours(handle: int | None) -> None:
    session = waiting()
    before = session.state
    assert session.tell(fault(FaultCode.UNKNOWN_SESSION, handle)) == ()
    assert session.state == before


def test_a_handle_that_was_ours_before_is_no_longer() -> None:
    session = waiting().is_told(UNKNOWN)
    assert session.tell(UNKNOWN) == ()
    session.is_told(opened(2, handle=5))
    before = session.state
    assert session.tell(UNKNOWN) == ()
    assert session.state == before


@pytest.mark.parametrize("session", [opening, running, waiting])
@pytest.mark.parametrize(
    "code", [FaultCode.OVERLOADED, *sorted(edge.CURABLE - {FaultCode.UNKNOWN_SESSION})]
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
        fault(FaultCode.MODEL_FAILED),
        UNKNOWN,
    ],
    ids=["overloaded", "model_failed", "unknown_session"],
)
def test_each_refusal_without_feedback_between_makes_the_pause_longer(refusal: Event) -> None:
    """The first misunderstanding is put right at once; from then on a worker is not hammered."""
    session, pauses = waiting(), []
    for _ in range(9):
        pauses += [e.pause_ms for e in session.tell(refusal) if isinstance(e, SeekPeer)]
        if session.state.stage == edge.Finished():
            break
        if session.state.stage == edge.Seeking():
            session.tell(START)
        session.tell(opened(session.state.incarnation))
    assert pauses == sorted(pauses)
    assert all(p == min(2 * q, 2000.0) for q, p in pairwise(pauses))
    assert pauses[0] == (200.0 if refusal == UNKNOWN else 100.0)
    assert len(pauses) >= 3


def test_feedback_makes_the_next_pause_short_again() -> None:
    session = waiting()
    for _ in range(2):
        session.tell(fault(FaultCode.OVERLOADED))
        session.tell(START)
    session.is_told(opened(session.state.incarnation), ALL_ACCEPTED)
    assert session.tell(fault(FaultCode.OVERLOADED)) == (SeekPeer("overloaded: why", 100.0),)


def test_an_incarnation_refused_before_any_window_is_used_again() -> None:
    """Waiting for a place uses none up: the bound of one owner is for real reopenings."""
    session = opening()
    first = session.state.incarnation
    for _ in range(50):
        session.tell(fault(FaultCode.OVERLOADED))
        assert [message.incarnation for message in opens(session)] == [first]
    session.tell(opened(first))
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


@pytest.mark.parametrize("code", sorted(edge.CURABLE - {FaultCode.UNKNOWN_SESSION}))
def test_a_prompt_that_fails_everywhere_ends_with_the_reason(code: FaultCode) -> None:
    session = waiting()
    for _ in range(edge.GIVE_UP_AFTER_FAILURES - 1):
        session.tell(fault(code))
        assert session.state.stage != edge.Finished()
        if session.state.stage == edge.Seeking():
            session.tell(START)
        session.tell(opened(session.state.incarnation))
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
