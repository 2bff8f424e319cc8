"""The cloud's machine given windows that are repeated, early, late, of other lives or broken."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bus.protocol.arrays import pack_tokens
from bus.protocol.bounds import SessionCoupling
from bus.protocol.codec import decode, encode
from bus.protocol.messages import (
    DraftWindow,
    FaultCode,
    OpenSession,
    Outcome,
)
from decoding import cloud, methods
from decoding.cloud import MAX_HELD, MAX_KEPT_FEEDBACKS, Stage
from decoding.cloud_events import (
    Crop,
    Send,
)
from tests.decoding.cloud_session import (
    ALL_ACCEPTED,
    FIRST_PASS,
    ONE_ACCEPTED,
    OPEN,
    PREFILLED,
    PROBS,
    PROMPT,
    SAMPLED,
    Cloud,
    Run,
    after_rejection,
    answered,
    arrives,
    feedback,
    idle,
    recovering,
    rows,
    verifying,
    window,
)

# --- any, WindowArrived, repeated -------------------------------------------------------------


def test_a_repeated_window_is_answered_from_its_feedback_and_computes_nothing() -> None:
    session = verifying().is_told(rows(2, 10, 11, 12, 50))
    before = session.state
    for _ in range(3):
        assert session.tell(arrives(window(), 300.0)) == (Send(ALL_ACCEPTED),)
        assert session.state == before


@pytest.mark.parametrize("session", [verifying, recovering])
def test_a_window_that_is_being_judged_is_not_judged_twice(session: Any) -> None:
    told = session()
    before = told.state
    assert told.tell(arrives(window(), 300.0)) == ()
    assert told.state is before


def test_a_held_window_is_held_once() -> None:
    session = Cloud().is_told(arrives(window()), arrives(window(), 300.0))
    assert len(session.state.held) == 1
    assert session.state.held[0].arrived_ms == 100.0


def test_old_feedbacks_are_forgotten_and_the_edge_reopens_by_itself() -> None:
    session = idle()
    for seq in range(MAX_KEPT_FEEDBACKS + 1):
        message = window(3, (10,), seq=seq)
        session.state = msgspec.structs.replace(session.state, tokens=PROMPT, num_run=2)
        session.is_told(arrives(message), rows(seq + 2, 10, 50))
    assert session.tell(arrives(window(3, (10,), seq=0))) == ()
    (again,) = session.tell(arrives(window(3, (10,), seq=1)))
    assert again.message.seq == 1


# --- … behind a gap, or busy ------------------------------------------------------------------


def test_a_window_behind_a_gap_is_held_until_the_missing_one_has_been_judged() -> None:
    session = idle(SAMPLED)
    second = window(6, (20, 21), seq=1)
    assert session.tell(arrives(second)) == ()
    assert session.state.held[0].message is second
    assert session.tell(arrives(window())) == (Run(2, (3, 10, 11), ((10, 0), (11, 0), (12, 0))),)
    effects = session.tell(rows(2, 0, 0, 0, p=(1.0, 1.0, 1.0)))
    assert effects == (
        *answered(feedback(Outcome.ACCEPTED, 3, 6, None, pass_tokens=3)),
        Run(3, (12, 20), ((20, 0), (21, 0))),
    )


def test_windows_held_behind_a_rejected_one_are_thrown_away() -> None:
    session = verifying().is_told(arrives(window(6, (20, 21), seq=1)))
    assert len(session.state.held) == 1
    assert session.tell(rows(2, 10, 60, 12, 50)) == (Crop(4), *answered(ONE_ACCEPTED))
    assert session.state.stage is Stage.IDLE
    assert not session.state.held


def test_windows_that_come_too_early_are_held_up_to_a_limit_and_do_not_shut_out_the_due_one() -> (
    None
):
    session = idle()
    for seq in range(5, 5 + MAX_HELD + 10):
        session.is_told(arrives(window(40, (10,), seq=seq)))
    assert len(session.state.held) == MAX_HELD
    assert session.tell(arrives(window())) == (FIRST_PASS,)


# --- … of an older epoch ----------------------------------------------------------------------


def test_a_window_of_an_older_epoch_gets_the_rejection_again_and_changes_nothing() -> None:
    session = after_rejection()
    before = session.state
    for seq in (0, 1, 2, 9):
        assert session.tell(arrives(window(6, (20,), seq=seq))) == (Send(ONE_ACCEPTED),)
        assert session.state == before


def test_where_the_rejection_is_not_kept_the_answer_is_a_bare_stale() -> None:
    session = idle(msgspec.structs.replace(OPEN, epoch=4, next_seq=9))
    before = session.state
    stale = feedback(Outcome.STALE, 0, 3, None, epoch=2, seq=1, verify_ms=0.0, queue_ms=0.0,
                     pass_tokens=0)  # fmt: skip
    assert session.tell(arrives(window(6, (20,), epoch=2, seq=1))) == (Send(stale),)
    assert session.state == before


def test_each_epoch_has_its_own_rejection() -> None:
    session = after_rejection().is_told(
        arrives(window(5, (20,), epoch=1, seq=1)), rows(3, 61, 50, now_ms=215.0)
    )
    assert session.state.epoch == 2
    assert session.tell(arrives(window(6, (20,), seq=3))) == (Send(ONE_ACCEPTED),)
    (again,) = session.tell(arrives(window(6, (20,), epoch=1, seq=3)))
    assert (again.message.seq, again.message.next_token) == (1, 61)


# --- … of another incarnation -----------------------------------------------------------------


def test_windows_of_a_lower_incarnation_get_no_answer() -> None:
    session = idle(msgspec.structs.replace(OPEN, incarnation=2))
    before = session.state
    for epoch, seq in ((0, 0), (0, 1), (5, 5)):
        assert session.tell(arrives(window(incarnation=1, epoch=epoch, seq=seq))) == ()
        assert session.state is before


def test_windows_of_a_higher_incarnation_are_of_a_session_not_known_yet() -> None:
    session = idle()
    before = session.state
    message = window(incarnation=2, epoch=3, seq=4)
    unknown = cloud.unknown_session(message)
    assert unknown == feedback(
        Outcome.UNKNOWN_SESSION, 0, 0, None, incarnation=2, epoch=3, seq=4, verify_ms=0.0,
        queue_ms=0.0, pass_tokens=0,
    )  # fmt: skip
    assert session.tell(arrives(message)) == (Send(unknown),)
    assert session.state is before


# --- faults -----------------------------------------------------------------------------------


def many_ids(bad: int) -> dict[str, Any]:
    return {"q_ids": pack_tokens((10, bad)), "q_probs": PROBS.tobytes()}


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (window(start=2), FaultCode.OUT_OF_ORDER),
        (window(start=4), FaultCode.OUT_OF_ORDER),
        (window(epoch=1), FaultCode.OUT_OF_ORDER),
        (window(tokens=tuple(range(1, 63))), FaultCode.CONTEXT_OVERFLOW),
        (window(tokens=(10,), **many_ids(100)), FaultCode.BAD_TOKENS),
        (window(tokens=(10,), **many_ids(-1)), FaultCode.BAD_TOKENS),
        (window(tokens=(10,), **many_ids(2**31 - 1)), FaultCode.BAD_TOKENS),
        (window(tokens=(10, 11, 12), q_ids=pack_tokens((10, 0) * 3)), FaultCode.BAD_TOKENS),
    ],
)
def test_a_window_that_cannot_be_judged_is_refused_and_the_session_goes_on(
    message: DraftWindow, code: FaultCode
) -> None:
    session = idle()
    before = session.state
    (send,) = session.tell(arrives(message))
    assert (send.message.session, send.message.code) == ("s1", code)
    assert decode(encode(send.message)) == send.message
    assert session.state == before
    assert session.tell(arrives(window())) == (FIRST_PASS,)


COUPLED = msgspec.structs.replace(OPEN, coupling=SessionCoupling.GUMBEL)
NO_ROWS: dict[str, Any] = {"q_ids": b"", "q_probs": b""}


@pytest.mark.parametrize(
    ("message", "method"),
    [(COUPLED, methods.fsd.METHOD), (OPEN, methods.sd.METHOD), (SAMPLED, methods.sd.METHOD)],
    ids=["lossy", "residual", "residual, sampled"],
)
def test_a_window_without_the_rows_that_its_rule_needs_is_refused(
    message: OpenSession, method: methods.Method
) -> None:
    session = Cloud(message, method).is_told(PREFILLED)
    before = session.state
    (send,) = session.tell(arrives(window(**NO_ROWS)))
    assert send.message.code is FaultCode.BAD_TOKENS
    assert f"{method.name} needs the draft's probabilities" in send.message.detail
    assert session.state == before
    assert isinstance(session.tell(arrives(window()))[0], Run)


@pytest.mark.parametrize("bad", [100, -1, 2**31 - 1])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_window_of_ids_alone_is_judged_by_its_tokens(bad: int, temperature: float) -> None:
    session = idle(msgspec.structs.replace(COUPLED, temperature=temperature))
    (send,) = session.tell(arrives(window(tokens=(10, bad), **NO_ROWS)))
    assert send.message.code is FaultCode.BAD_TOKENS
    assert "0 … 99" in send.message.detail
    (run,) = session.tell(arrives(window(tokens=(10, 99), **NO_ROWS)))
    assert run == Run(2, (3, 10, 99), ((), (), ()))


def test_a_window_up_to_the_end_of_the_context_is_judged() -> None:
    (run,) = idle().tell(arrives(window(tokens=tuple(range(1, 62)))))
    assert isinstance(run, Run)


def test_a_token_its_own_warped_distribution_rules_out_is_refused() -> None:
    """top_k = 1 leaves token 10 alone: nobody can have drawn 0."""
    session = idle(msgspec.structs.replace(SAMPLED, top_k=1))
    message = window(tokens=(0,), q_ids=pack_tokens((10, 0)), q_probs=PROBS.tobytes())
    (send,) = session.tell(arrives(message))
    assert send.message.code is FaultCode.BAD_TOKENS
