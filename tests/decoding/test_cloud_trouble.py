"""The cloud's machine given windows that are repeated, early, of another text or broken."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from bus.protocol.arrays import pack_tokens
from bus.protocol.codec import decode, encode
from bus.protocol.messages import Ack, DraftRows, DraftWindow, FaultCode, Outcome
from decoding import cloud
from decoding.cloud_events import Forward, Prefill
from decoding.cloud_state import MAX_JUDGED
from decoding.draft_tree import MAX_WINDOWS
from tests.decoding.cloud_session import (
    LOSSY,
    OPEN,
    PROMPT,
    RESIDUAL,
    Cloud,
    Reported,
    acked,
    after_rejection,
    arrives,
    idle,
    recovering,
    repeated,
    verifying,
    window,
)
from tests.sessions import drafted_rows, text_hash

# --- repeated ---------------------------------------------------------------------------------


def test_a_repeated_window_is_answered_and_judged_once() -> None:
    session = verifying().has_run(10, 11, 12, 50)
    before = session.state
    for _ in range(3):
        assert session.tell(arrives(window(), 300.0)) == (repeated(3, (10, 11, 12, 50)),)
        assert session.state == before


@pytest.mark.parametrize(("acknowledged", "tokens"), [(3, (10, 60)), (4, (60,)), (5, ())])
def test_the_answer_begins_where_the_edge_says_its_text_ends(
    acknowledged: int, tokens: tuple[int, ...]
) -> None:
    session = after_rejection()
    effects = session.tell(arrives(window(acknowledged=acknowledged)))
    assert effects == (repeated(acknowledged, tokens),)
    assert session.state.acknowledged == acknowledged


def test_what_was_acknowledged_once_is_not_sent_again() -> None:
    session = after_rejection().is_told(acked(5))
    assert session.tell(arrives(window(acknowledged=3))) == (repeated(5, ()),)


@pytest.mark.parametrize("session", [Cloud, verifying, recovering])
def test_a_window_that_waits_or_is_being_judged_is_not_judged_twice(session: Any) -> None:
    told = session()
    rows = told.state.sampling.coupled is False
    told.is_told(arrives(window(rows=rows), 100.0))
    before = told.state
    assert told.tell(arrives(window(rows=rows), 300.0)) == (repeated(3, ()),)
    assert told.state == before
    (waiting,) = told.state.drafts.windows
    assert waiting.source.arrived_ms == 100.0


def test_numbers_of_judged_windows_are_forgotten_late() -> None:
    session = idle(msgspec.structs.replace(OPEN, max_new_tokens=400), context_length=512)
    for number in range(1, MAX_JUDGED + 2):
        session.is_told(arrives(window((10,), session.text, number=number))).has_run(10, 50)
    assert session.state.judged == tuple(range(2, MAX_JUDGED + 2))
    (again,) = session.tell(arrives(window((10,), session.text[:-2], number=MAX_JUDGED + 1)))
    assert again.message.token_ids == session.text[3:]


# --- early ------------------------------------------------------------------------------------


def test_a_window_beyond_the_text_waits_for_the_one_before_it() -> None:
    session = idle()
    assert session.tell(arrives(window((20, 21), (*PROMPT, 10, 11, 12), number=2))) == ()
    assert session.tell(arrives(window())) == (Forward(2),)
    assert session.pass_begins().feed == (3, 10, 11, 12, 20, 21)


def test_a_window_after_what_the_target_writes_is_found_when_that_is_written() -> None:
    session = idle().is_told(arrives(window((20, 21), (*PROMPT, 10, 11, 12, 50), number=2)))
    *_, forward = session.is_told(arrives(window())).ran(10, 11, 12, 50)
    assert forward == Forward(3)
    assert session.pass_begins().feed == (50, 20, 21)


def test_of_too_many_windows_those_furthest_away_are_dropped() -> None:
    session = idle(context_length=4096)
    for number in range(2, MAX_WINDOWS + 12):
        text = (*PROMPT, *range(number))
        session.is_told(arrives(window((10,), text, number=number)))
    assert len(session.state.drafts.windows) == MAX_WINDOWS
    assert session.tell(arrives(window())) == (Forward(2),)


# --- after another text -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        window((20,), (*PROMPT, 10, 11), number=2),  # the text is 10 60
        window((20,), (*PROMPT, 11), number=2),
        window((10, 60, 20), (1, 2, 4), number=2),
        window((20,), (*PROMPT, 10, 60), number=2, follows=bytes(8)),
    ],
)
@pytest.mark.parametrize("again", [1, 2])
def test_a_window_drafted_after_another_text_is_dropped_without_a_word(
    message: DraftWindow, again: int
) -> None:
    session = after_rejection()
    for _ in range(again):
        assert session.tell(arrives(message)) == ()
    assert session.state.drafts.windows == ()
    assert message.number not in session.state.judged


def test_one_that_waits_goes_when_the_text_has_passed_it() -> None:
    session = idle().is_told(arrives(window((20,), (*PROMPT, 9, 9), number=2)))
    session.is_told(arrives(window()))
    assert len(session.state.drafts.windows) == 2
    assert session.ran(10, 11, 12, 50)[1:] == (Reported(1, Outcome.ACCEPTED, 3, own=50),)
    assert not session.state.drafts.windows


def test_a_repeated_draft_under_another_number_is_judged_by_the_text() -> None:
    session = verifying().is_told(arrives(window(number=2)))
    assert [w.source.message.number for w in session.state.drafts.windows] == [1]
    session.ran(10, 60, 0, 0)
    effects = session.tell(arrives(window(number=3)))
    assert effects == (Reported(3, Outcome.PREHIT_REJECTED, 1, reached=1),)


# --- acknowledgements -------------------------------------------------------------------------


def test_an_acknowledgement_is_remembered_and_needs_no_answer() -> None:
    session = after_rejection()
    assert session.tell(acked(4)) == ()
    assert session.tell(acked(3, number=10)) == ()
    assert session.state.acknowledged == 4
    assert session.state.heard is not None
    assert session.state.heard.number == 10


def test_one_that_asks_gets_all_beyond_it_though_more_was_acknowledged_before() -> None:
    session = after_rejection().is_told(acked(5))
    for length, tokens in ((3, (10, 60)), (4, (60,)), (5, ())):
        assert session.tell(acked(length, again=True)) == (repeated(length, tokens),)


def test_the_last_message_heard_is_the_one_of_the_highest_number() -> None:
    session = verifying().is_told(acked(3, number=7, now_ms=108.0), acked(3, number=2))
    send, *_ = session.ran(10, 11, 12, 50)
    assert (send.message.number, send.message.held_ms) == (7, 7.0)


@pytest.mark.parametrize("length", [0, 2, 6, 2**31 - 1])
@pytest.mark.parametrize("again", [False, True])
def test_acknowledging_what_there_is_not_is_refused(length: int, again: bool) -> None:
    session = after_rejection()
    before = session.state
    (send,) = session.tell(acked(length, again=again))
    assert (send.message.session, send.message.code) == ("s1", FaultCode.BAD_TOKENS)
    assert session.state == before


@pytest.mark.parametrize("message", [window(handle=7), Ack(7, 3, 5)])
def test_a_session_that_is_not_known_here_is_named_by_its_handle(message: Any) -> None:
    fault = cloud.unknown_session(message)
    assert (fault.session, fault.code, fault.handle) == ("-", FaultCode.UNKNOWN_SESSION, 7)
    assert decode(encode(fault)) == fault


# --- faults -----------------------------------------------------------------------------------


def with_ids(*ids: int) -> DraftRows:
    return drafted_rows((10,), q_ids=pack_tokens(ids))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"start": 2}, FaultCode.BAD_TOKENS),  # in the prompt
        ({"acknowledged": 2}, FaultCode.BAD_TOKENS),
        ({"acknowledged": 4}, FaultCode.BAD_TOKENS),
        ({"start": 62}, FaultCode.CONTEXT_OVERFLOW),
        ({"tokens": tuple(range(1, 63))}, FaultCode.CONTEXT_OVERFLOW),
        ({"tokens": (10, 100)}, FaultCode.BAD_TOKENS),
        ({"tokens": (-1,)}, FaultCode.BAD_TOKENS),
        ({"tokens": (10,), "rows": with_ids(10, 100)}, FaultCode.BAD_TOKENS),
        ({"tokens": (10,), "rows": with_ids(10, -1)}, FaultCode.BAD_TOKENS),
        ({"tokens": (10,), "rows": with_ids(10, 2**31 - 1)}, FaultCode.BAD_TOKENS),
    ],
)
def test_a_window_that_cannot_be_judged_is_refused_and_the_session_goes_on(
    changes: dict[str, Any], code: FaultCode
) -> None:
    session = idle()
    before = session.state
    (send,) = session.tell(arrives(window(number=2, **changes)))
    assert (send.message.session, send.message.code) == ("s1", code)
    assert decode(encode(send.message)) == send.message
    assert session.state == before
    assert session.tell(arrives(window())) == (Forward(2),)


def test_a_window_up_to_the_end_of_the_context_is_judged() -> None:
    assert idle().tell(arrives(window(tuple(range(1, 62))))) == (Forward(2),)


@pytest.mark.parametrize(
    ("session", "needed"),
    [
        (lambda: idle(RESIDUAL), True),
        (lambda: idle(method=LOSSY), True),
        (idle, False),
    ],
    ids=["residual", "lossy", "exact"],
)
def test_rows_are_needed_where_tokens_are_judged_by_them(session: Any, needed: bool) -> None:
    (effect,) = session().tell(arrives(window()))
    assert (not isinstance(effect, Forward)) is needed
    assert not needed or "needs the draft's probabilities" in effect.message.detail
    assert isinstance(session().tell(arrives(window(rows=True)))[0], Forward)


@pytest.mark.parametrize(
    ("message", "tokens", "row"),
    [
        (msgspec.structs.replace(RESIDUAL, top_k=1), (0,), with_ids(10, 0)),  # leaves 10 alone
        (RESIDUAL, (10,), with_ids(11, 12)),
        (OPEN, (10,), with_ids(11, 12)),
    ],
)
def test_a_token_its_own_distribution_rules_out_is_refused(
    message: Any, tokens: tuple[int, ...], row: DraftRows
) -> None:
    session = idle(message)
    (send,) = session.tell(arrives(window(tokens, rows=row)))
    assert send.message.code is FaultCode.BAD_TOKENS
    assert "rules out" in send.message.detail


def test_a_window_that_comes_while_the_prompt_runs_is_checked_too() -> None:
    session = Cloud()
    assert isinstance(session.effects[-1], Prefill)
    (send,) = session.tell(arrives(window((10, 100))))
    assert send.message.code is FaultCode.BAD_TOKENS


def test_hashes_are_of_the_whole_text() -> None:
    session = after_rejection()
    for length in range(3, 6):
        assert session.state.hash_at(length) == text_hash(session.text[:length])
    assert np.unique([session.state.hash_at(n) for n in range(3, 6)]).size == 3
