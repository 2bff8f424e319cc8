"""The cloud's machine as conversations: an event in, the exact list of effects out.

The sections follow the table in `decoding.cloud`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest

from bus.protocol.arrays import pack_tokens
from bus.protocol.codec import decode, encode
from bus.protocol.errors import ImpossibleEventError
from bus.protocol.messages import FaultCode, Outcome
from decoding import cloud
from decoding.acceptance import draw_residual
from decoding.cloud_events import (
    Crop,
    Event,
    FetchRow,
    Forward,
    FullRowReady,
    Prefill,
    Prefilled,
    PrehitFailed,
    RowsReady,
)
from decoding.engine import TargetRow
from decoding.methods.base import Proposal
from decoding.methods.exact import ExactRule
from decoding.sampling import SamplingParams, from_wire, warp
from decoding.uniforms import Purpose, uniform
from decoding.verification import Plan
from tests.decoding.cloud_session import (
    AHEAD,
    CHOSEN,
    LIMITS,
    LOSSY,
    OPEN,
    OPENED,
    PREFILLED,
    PROMPT,
    READY,
    RESIDUAL,
    SD,
    Cloud,
    Reported,
    arrives,
    feedback,
    idle,
    recovering,
    row,
    verifying,
    window,
)
from tests.sessions import drafted_rows

ALL_ACCEPTED = feedback(3, (10, 11, 12, 50)), Reported(1, Outcome.ACCEPTED, 3, own=50)
ONE_ACCEPTED = feedback(3, (10, 60)), Reported(1, Outcome.PARTIAL, 1, own=60)

# --- (open) -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "prefill"),
    [
        ({}, (1, 2)),
        ({"committed": pack_tokens((7, 8))}, (1, 2, 3, 7)),
        ({"prompt": pack_tokens((1,))}, ()),
    ],
)
def test_opening_says_ready_reports_and_runs_all_but_the_last_token(
    changes: dict[str, Any], prefill: tuple[int, ...]
) -> None:
    new = Cloud(msgspec.structs.replace(OPEN, **changes))
    assert new.effects == (READY, OPENED, Prefill(job=1, tokens=prefill))
    assert new.state.stage == cloud.Prefilling()
    assert new.state.num_run == len(new.text) - 1
    assert new.state.acknowledged == new.state.sent_length == len(new.text)


@pytest.mark.parametrize(
    ("changes", "digest", "code"),
    [
        ({}, "digest", None),
        ({}, "another", FaultCode.TOKENIZER_MISMATCH),
        ({"prompt": pack_tokens((1, 99))}, "digest", None),
        ({"prompt": pack_tokens((1, 100))}, "digest", FaultCode.BAD_TOKENS),
        ({"prompt": pack_tokens((-1, 1))}, "digest", FaultCode.BAD_TOKENS),
        ({"committed": pack_tokens((100,))}, "digest", FaultCode.BAD_TOKENS),
        ({"max_new_tokens": 61}, "digest", None),
        ({"max_new_tokens": 62}, "digest", FaultCode.CONTEXT_OVERFLOW),
        ({"max_new_tokens": 2**31 - 1}, "digest", FaultCode.CONTEXT_OVERFLOW),
    ],
)
def test_what_cannot_be_opened_is_refused_with_a_reason(
    changes: dict[str, Any], digest: str, code: FaultCode | None
) -> None:
    fault = cloud.check_open(msgspec.structs.replace(OPEN, **changes), digest, LIMITS)
    assert (fault and fault.code) == code
    if fault is not None:
        assert fault.session == "s1"
        assert decode(encode(fault)) == fault


# --- PREFILLING, Prefilled --------------------------------------------------------------------


def test_once_prefilled_it_waits_for_a_window() -> None:
    new = Cloud()
    assert new.tell(PREFILLED) == ()
    assert new.state.stage == cloud.Idle()


def test_a_window_that_came_while_prefilling_is_run_then() -> None:
    new = Cloud()
    assert new.tell(arrives(window())) == ()
    assert new.tell(PREFILLED) == (Forward(2),)
    assert new.pass_begins().feed == (3, 10, 11, 12)


# --- IDLE, a draft continues the text ---------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "rows", "row_ids", "choices_at"),
    [
        (OPEN, False, ((), (), (), ()), (None, None, None, None)),
        (OPEN, True, ((10, 0), (11, 0), (12, 0), ()), (None, None, None, None)),
        (CHOSEN, False, ((), (), (), ()), (3, 4, 5, 6)),
        (RESIDUAL, True, ((10, 0), (11, 0), (12, 0), ()), (None, None, None, 6)),
    ],
    ids=["greedy", "greedy with rows", "gumbel", "residual"],
)
def test_a_pass_runs_the_last_token_and_the_draft_and_wants_what_judging_needs(
    message: Any, rows: bool, row_ids: Any, choices_at: Any
) -> None:
    """The target's own choice, wherever the coupling decides by it; probabilities of the ids sent,
    so that `p_at_q` lies beside the window's row."""
    session = idle(message)
    assert session.tell(arrives(window(rows=rows))) == (Forward(2),)
    assert session.state.stage == cloud.Verifying()
    plan = session.pass_begins()
    assert plan.feed == (3, 10, 11, 12)
    assert tuple(tuple(ids.tolist()) for ids in plan.row_ids) == row_ids
    assert plan.choices_at == choices_at
    assert [place.token for place in plan.path] == [10, 11, 12]
    assert plan.prehit is None


def test_windows_that_come_before_the_pass_begins_are_in_it() -> None:
    session = verifying()
    assert session.tell(arrives(window((13,), (*PROMPT, 10, 11, 12), number=2))) == ()
    assert session.pass_begins().feed == (3, 10, 11, 12, 13)


# --- VERIFYING, RowsReady ---------------------------------------------------------------------


@pytest.mark.parametrize("message", [OPEN, CHOSEN])
def test_a_full_acceptance_commits_the_targets_next_token_too(message: Any) -> None:
    session = verifying(message)
    assert session.ran(10, 11, 12, 50) == ALL_ACCEPTED
    assert session.text == (1, 2, 3, 10, 11, 12, 50)
    assert (session.state.num_run, session.state.sent_length) == (6, 7)
    assert session.tell(arrives(window((20,), session.text, number=2))) == (Forward(3),)
    assert session.pass_begins().feed == (50, 20)


@pytest.mark.parametrize("message", [OPEN, CHOSEN])
def test_a_rejection_crops_and_commits_what_the_target_would_write(message: Any) -> None:
    session = verifying(message)
    assert session.ran(10, 60, 12, 50) == (Crop(4), *ONE_ACCEPTED)
    assert session.text == (1, 2, 3, 10, 60)
    assert session.state.num_run == 4
    assert session.state.stage == cloud.Idle()
    assert session.tell(arrives(window((20,), session.text, number=2))) == (Forward(3),)
    assert session.pass_begins().feed == (60, 20)


def test_nothing_accepted_crops_to_the_text_before_the_window() -> None:
    effects = verifying().ran(60, 11, 12, 50)
    assert effects == (Crop(3), feedback(3, (60,)), Reported(1, Outcome.PARTIAL, 0, own=60))


def test_the_targets_choice_decides_and_not_its_argmax() -> None:
    session = verifying(CHOSEN)
    done = session.pass_begins()
    rows = tuple(msgspec.structs.replace(row(token), argmax=99) for token in (10, 60, 0, 0))
    effects = session.tell(RowsReady(2, done, rows, 10.0, 115.0))
    assert effects == (Crop(4), *ONE_ACCEPTED)


@pytest.mark.parametrize("method", [SD, dataclasses.replace(LOSSY, pace=SD.pace)])
def test_a_lockstep_method_gets_the_bonus_whatever_its_rule(method: Any) -> None:
    """Its draft waits for the feedback: the token is not taken from anything."""
    message = RESIDUAL if method is SD else CHOSEN
    session = verifying(message, method)
    assert session.ran(10, 11, 12, 50, p=(1.0, 1.0, 1.0)) == ALL_ACCEPTED
    assert session.state.kept is None


@pytest.mark.parametrize(("message", "method"), [(RESIDUAL, AHEAD), (CHOSEN, LOSSY)])
def test_a_draft_that_goes_on_may_yet_put_another_token_there(message: Any, method: Any) -> None:
    session = verifying(message, method)
    effects = session.ran(10, 11, 12, 50, p=(1.0, 1.0, 1.0))
    assert effects == (feedback(3, (10, 11, 12)), Reported(1, Outcome.ACCEPTED, 3))
    assert session.state.kept is not None
    assert (session.state.num_run, len(session.text)) == (6, 6)


def test_the_rule_judges_each_token_at_its_position_until_one_falls() -> None:
    seen: list[tuple[int, int, float]] = []

    class Rule(ExactRule):
        def accepts(
            self, proposal: Proposal, row: TargetRow, params: SamplingParams, position: int,
            threshold: float,
        ) -> bool:  # fmt: skip
            seen.append((proposal.token, position, threshold))
            return proposal.token != 11

    session = idle(OPEN, dataclasses.replace(SD, acceptance=Rule()))
    session.is_told(arrives(window(rows=True)))
    session.ran(1, 2, 3, 4)
    assert seen == [(10, 3, 0.1), (11, 4, 0.1)]


def test_what_the_target_would_write_itself_stands_whatever_the_rule_says() -> None:
    session = idle(CHOSEN, LOSSY)
    session.is_told(arrives(window((60, 61), rows=True)))
    effects = session.ran(60, 70, 0)
    assert effects[1:] == (
        feedback(3, (60, 70), pass_tokens=3),
        Reported(1, Outcome.PARTIAL, 1, 70),
    )


@pytest.mark.parametrize(
    ("asked", "given"), [(0.1, 0.1), (0.9, 0.3), (0.3, 0.3), (-0.9, -0.5), (-0.5, -0.5)]
)
def test_thresholds_are_clipped_to_the_operators_bounds(asked: float, given: float) -> None:
    judged_by: list[float] = []

    class Rule(ExactRule):
        def accepts(self, *args: Any) -> bool:
            judged_by.append(args[-1])
            return True

    session = idle(OPEN, dataclasses.replace(SD, acceptance=Rule()))
    rows = drafted_rows((10,), threshold=asked)
    session.is_told(arrives(window((10,), rows=rows)))
    session.ran(1, 2)
    assert judged_by == [given]
    assert session.judged[0].threshold == given


@pytest.mark.parametrize(("arrived_ms", "queue_ms"), [(100.0, 5.0), (105.0, 0.0), (106.0, 0.0)])
def test_queueing_is_what_was_neither_transport_nor_verification(
    arrived_ms: float, queue_ms: float
) -> None:
    session = idle().is_told(arrives(window(), now_ms=arrived_ms))
    send, _ = session.ran(10, 11, 12, 50, now_ms=115.0)
    message = send.message
    assert (message.verify_ms, message.queue_ms) == (10.0, queue_ms)
    assert message.held_ms == 115.0 - arrived_ms


def test_feedback_names_the_message_that_came_last() -> None:
    session = verifying()
    session.pass_begins()
    session.is_told(arrives(window((13,), (*PROMPT, 10, 11, 12), number=2), now_ms=112.0))
    send, *_ = session.ran(10, 11, 12, 50)
    assert (send.message.number, send.message.held_ms) == (2, 3.0)


# --- … rejected, residual; RECOVERING, FullRowReady -------------------------------------------


def test_a_residual_rejection_fetches_the_row_it_fell_on() -> None:
    session = verifying(RESIDUAL)
    assert session.ran(0, 0, 0, 50, p=(1.0, 0.0, 1.0)) == (FetchRow(job=2, index=1),)
    assert session.state.stage.name == "recovering"
    assert session.text == PROMPT


def test_the_recovered_token_is_drawn_from_the_residual_at_its_position() -> None:
    target = np.full(100, 0.01)
    q = warp(
        from_wire(np.array([11, 0], np.int32), np.array([0.75, 0.25], np.float16)),
        SamplingParams(1.0, seed=5),
    )
    token = draw_residual(target, q, uniform(5, 4, Purpose.RESIDUAL))
    session = recovering()
    assert session.tell(FullRowReady(2, target, 120.0)) == (
        Crop(4), feedback(3, (10, token)), Reported(1, Outcome.PARTIAL, 1, own=token),
    )  # fmt: skip
    assert session.text == (1, 2, 3, 10, token)
    assert session.state.num_run == 4


def test_where_the_residual_gives_the_rejected_token_the_rest_is_judged() -> None:
    """Nothing that was drafted after it is wrong for that."""
    effects = recovering().tell(FullRowReady(2, np.eye(100)[11], 120.0))
    assert effects == ALL_ACCEPTED


def test_a_later_token_may_be_rejected_then() -> None:
    session = verifying(RESIDUAL).has_run(0, 0, 0, 50, p=(1.0, 0.0, 0.0))
    assert session.tell(FullRowReady(2, np.eye(100)[11], 120.0)) == (FetchRow(2, 2),)
    assert session.tell(FullRowReady(2, np.eye(100)[77], 121.0)) == (
        Crop(5), feedback(3, (10, 11, 77)), Reported(1, Outcome.PARTIAL, 2, own=77),
    )  # fmt: skip


def test_a_window_that_comes_while_recovering_is_dropped_where_it_followed_the_draft() -> None:
    session = recovering()
    assert session.tell(arrives(window((20,), (*PROMPT, 10, 11, 12), True, number=2))) == ()
    session.is_told(FullRowReady(2, np.eye(100)[77], 120.0))
    assert session.state.stage == cloud.Idle()
    assert session.state.drafts.path(5, session.state.hashes[-1], 9) == ()


# --- what cannot happen -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("session", "event"),
    [
        (Cloud, RowsReady(1, Plan(), (), 1.0, 1.0)),
        (Cloud, Prefilled(2, 1.0)),
        (idle, PREFILLED),
        (verifying, FullRowReady(2, np.eye(100)[1], 1.0)),
        (recovering, RowsReady(2, Plan(), (), 1.0, 1.0)),
        (idle, PrehitFailed(1, Plan(), row(1), 1.0)),
    ],
)
def test_work_that_was_never_asked_for_is_an_error_and_changes_nothing(
    session: Any, event: Event
) -> None:
    told = session()
    before = told.state
    with pytest.raises(ImpossibleEventError):
        told.tell(event)
    assert told.state == before
