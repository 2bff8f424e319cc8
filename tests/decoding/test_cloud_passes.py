"""Several windows in one pass, and the row kept between passes, as conversations."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from bus.protocol.messages import OpenSession, Outcome
from decoding import cloud
from decoding.acceptance import draw_residual
from decoding.cloud_events import Crop, FetchRow, Forward, FullRowReady, OpenArrived
from decoding.cloud_state import MAX_PASS_TOKENS
from decoding.methods import Method
from decoding.sampling import SamplingParams, from_wire, warp
from decoding.uniforms import Purpose, uniform
from decoding.verification import Plan, window_report
from decoding.verification import Reported as Whose
from tests.decoding.cloud_session import (
    AHEAD,
    CHOSEN,
    LOSSY,
    LOSSY_ON,
    OPEN,
    PREFILLED,
    PROMPT,
    RESIDUAL,
    Cloud,
    Reported,
    arrives,
    feedback,
    idle,
    repeated,
    row,
    window,
)

FIRST, SECOND, THIRD = (10, 11), (20, 21), (30,)
AFTER_FIRST = (*PROMPT, *FIRST)
AFTER_SECOND = (*AFTER_FIRST, *SECOND)


def first(rows: bool = False) -> Any:
    return arrives(window(FIRST, rows=rows), 100.0)


def second(rows: bool = False, **changes: Any) -> Any:
    return arrives(window(SECOND, AFTER_FIRST, rows, number=2, **changes), 101.0)


def third(rows: bool = False, **changes: Any) -> Any:
    return arrives(window(THIRD, AFTER_SECOND, rows, number=3, **changes), 102.0)


def kept(message: OpenSession = CHOSEN, method: Method = LOSSY) -> Cloud:
    """Tokens 10 and 11 have been accepted, all has run, the row after them is kept: the target
    would write 60 there."""
    return idle(message, method).is_told(first(rows=True)).has_run(0, 0, 60, p=(1.0, 1.0))


def path_of(session: Cloud) -> tuple[int, ...]:
    return tuple(place.token for place in session.pass_begins().path)


# --- several windows, one pass ----------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_windows_that_waited_for_the_prompt_share_one_pass_whatever_their_order(
    order: tuple[int, ...],
) -> None:
    session = Cloud()
    session.is_told(*([first(), second(), third()][i] for i in order))
    assert session.tell(PREFILLED) == (Forward(2),)
    assert session.pass_begins().feed == (3, 10, 11, 20, 21, 30)


def test_each_window_of_a_pass_has_its_own_report_and_all_one_feedback() -> None:
    session = idle().is_told(first(), second(), third())
    effects = session.ran(10, 11, 20, 21, 30, 50)
    assert effects == (
        feedback(3, (10, 11, 20, 21, 30, 50), number=3, held_ms=13.0, pass_tokens=6),
        Reported(1, Outcome.ACCEPTED, 2),
        Reported(2, Outcome.ACCEPTED, 2),
        Reported(3, Outcome.ACCEPTED, 1, own=50),
    )
    assert [judged.pass_tokens for judged in session.judged] == [6, 0, 0]
    assert [judged.queue_ms for judged in session.judged] == [5.0, 4.0, 3.0]
    assert [len(judged.rows) for judged in session.judged] == [2, 2, 2]
    assert session.state.drafts.windows == ()


def test_a_rejection_voids_the_later_windows_of_its_pass() -> None:
    """They follow a text that is not to be: they go without a word once it has been passed."""
    session = idle().is_told(first(), second(), third())
    assert session.ran(10, 11, 60, 21, 30, 31) == (
        Crop(5),
        feedback(3, (10, 11, 60), number=3, held_ms=13.0, pass_tokens=6),
        Reported(1, Outcome.ACCEPTED, 2),
        Reported(2, Outcome.PARTIAL, 0, own=60),
    )
    assert session.text == (*AFTER_FIRST, 60)
    session.is_told(arrives(window((22,), session.text, number=4)))
    assert session.ran(22, 50)[1:] == (Reported(4, Outcome.ACCEPTED, 1, own=50),)
    assert session.state.drafts.windows == ()


def test_a_residual_rejection_in_a_later_window_fetches_its_row_of_the_pass() -> None:
    session = idle(RESIDUAL).is_told(first(True), second(True))
    assert session.ran(0, 0, 0, 0, 50, p=(1.0, 1.0, 1.0, 0.0)) == (FetchRow(2, 3),)
    target = np.full(100, 0.01)
    q = warp(
        from_wire(np.array([21, 0], np.int32), np.array([0.75, 0.25], np.float16)),
        SamplingParams(1.0, seed=5),
    )
    token = draw_residual(target, q, uniform(5, 6, Purpose.RESIDUAL))
    crop, _, *reports = session.tell(FullRowReady(2, target, 120.0))
    assert crop == Crop(6)
    assert reports == [Reported(1, Outcome.ACCEPTED, 2), Reported(2, Outcome.PARTIAL, 1, own=token)]
    assert session.text == (*AFTER_FIRST, 20, token)


@pytest.mark.parametrize(
    ("windows", "length"),
    [
        ((100, 100), 200),
        ((100, 100, 100), 200),  # a window is not cut where others fill the pass
        ((256,), 256),
        ((255, 2), 255),
        ((300,), 256),  # one alone is
        ((300, 10), 256),
    ],
)
def test_a_pass_holds_whole_windows_up_to_its_length(windows: tuple[int, ...], length: int) -> None:
    assert MAX_PASS_TOKENS == 256
    session = idle(context_length=4096)
    text: tuple[int, ...] = PROMPT
    for number, size in enumerate(windows, 1):
        tokens = tuple(1 + (number + i) % 90 for i in range(size))
        session.is_told(arrives(window(tokens, text, number=number)))
        text += tokens
    assert len(session.pass_begins().path) == length


def test_a_window_too_long_for_a_pass_goes_on_in_the_next() -> None:
    session = idle(msgspec.structs.replace(OPEN, max_new_tokens=900), context_length=4096)
    tokens = tuple(1 + i % 90 for i in range(300))
    session.is_told(arrives(window(tokens)))
    *_, forward = session.ran(*tokens[:257])
    assert session.judged == []
    assert forward == Forward(3)
    assert path_of(session) == tokens[257:]
    _, report = session.ran(*tokens[257:], 50)
    assert report == Reported(1, Outcome.ACCEPTED, 300, own=50, reached=257)


def test_of_two_branches_the_longer_one_runs_and_the_text_judges_the_other() -> None:
    session = idle()
    session.is_told(first(), second(), arrives(window((10, 12, 13), number=3), 102.0))
    assert path_of(session) == (10, 11, 20, 21)
    effects = session.ran(10, 12, 0, 0, 0)
    assert effects[:3] == (
        Crop(4), feedback(3, (10, 12), number=3, held_ms=13.0, pass_tokens=5),
        Reported(1, Outcome.PARTIAL, 1, own=12),
    )  # fmt: skip
    assert path_of(session) == (13,)
    assert session.ran(13, 50)[1] == Reported(3, Outcome.ACCEPTED, 3, own=50, reached=2)


def test_a_pass_of_the_incarnation_before_holds_nothing() -> None:
    session = idle().is_told(first())
    reopened = msgspec.structs.replace(OPEN, incarnation=2)
    session.is_told(OpenArrived(reopened, 2))
    assert cloud.plan(session.state, Forward(2)) == Plan()


# --- the kept row -----------------------------------------------------------------------------


def test_after_a_full_acceptance_the_next_window_is_judged_by_the_kept_row_first() -> None:
    session = kept()
    assert session.tell(second(True)) == (Forward(3),)
    plan = session.pass_begins()
    assert plan.feed == (20, 21)
    assert tuple(tuple(ids.tolist()) for ids in plan.row_ids) == ((21, 0), ())
    assert plan.choices_at == (6, 7)
    assert plan.prehit is not None
    want, test = plan.prehit.want, plan.prehit.test
    assert (plan.prehit.index, test.position, test.proposal.token) == (2, 5, 20)
    assert (want.ids.tolist(), want.choice_at) == ([20, 0], 5)
    effects = session.ran(0, 0, 61)
    expected = feedback(5, SECOND, number=2, held_ms=14.0, queue_ms=4.0, pass_tokens=2)
    assert effects == (expected, Reported(2, Outcome.ACCEPTED, 2))
    assert session.state.num_run == 7
    assert session.state.kept is not None
    assert (session.state.kept.index, session.state.kept.own) == (1, 61)


def test_a_window_that_fails_at_pre_hit_costs_no_pass_and_brings_the_next_token() -> None:
    session = kept()
    session.is_told(arrives(window((70, 71), AFTER_FIRST, True, number=2), 101.0))
    session.is_told(arrives(window((72,), (*AFTER_FIRST, 70, 71), True, number=3), 102.0))
    assert session.prehit_failed(60) == (
        feedback(5, (60,), number=3, held_ms=5.0, verify_ms=0.0, queue_ms=6.0, pass_tokens=0,
                 prehit=True),
        Reported(2, Outcome.PREHIT_REJECTED, 0, own=60),
    )  # fmt: skip
    assert (session.text, session.state.num_run) == ((*AFTER_FIRST, 60), 5)
    assert session.state.kept is None
    session.is_told(arrives(window((40,), session.text, True, number=4)))
    plan = session.pass_begins()
    assert (plan.feed, plan.prehit) == ((60, 40), None)


def test_with_residual_coupling_the_token_comes_from_the_kept_rows_residual() -> None:
    session = kept(RESIDUAL, AHEAD).is_told(second(True))
    assert session.prehit_failed(0) == (FetchRow(3, 2),)
    target = np.full(100, 0.01)
    q = warp(
        from_wire(np.array([20, 0], np.int32), np.array([0.75, 0.25], np.float16)),
        SamplingParams(1.0, seed=5),
    )
    token = draw_residual(target, q, uniform(5, 5, Purpose.RESIDUAL))
    sent, report = session.tell(FullRowReady(3, target, 120.0))
    assert (sent.message.prehit, sent.message.token_ids) == (True, (token,))
    assert report == Reported(2, Outcome.PREHIT_REJECTED, 0, own=token)


def test_where_that_residual_gives_the_rejected_token_its_window_goes_on() -> None:
    session = kept(RESIDUAL, AHEAD).is_told(second(True))
    session.prehit_failed(0)
    sent, forward = session.tell(FullRowReady(3, np.eye(100)[20], 120.0))
    assert (sent.message.token_ids, sent.message.prehit) == ((20,), False)
    assert forward == Forward(4)
    plan = session.pass_begins()
    assert (plan.feed, plan.prehit) == ((20, 21), None)
    _, report = session.ran(0, 50, p=(1.0,))
    assert report == Reported(2, Outcome.ACCEPTED, 2, reached=1)


def test_a_kept_row_of_a_lossy_method_is_committed_at_once_where_no_window_waits() -> None:
    """The target does not wait for a draft that may never come."""
    session = idle(CHOSEN, LOSSY_ON).is_told(first(True))
    effects = session.ran(0, 0, 60)
    assert effects == (
        feedback(3, FIRST, pass_tokens=3),
        Reported(1, Outcome.ACCEPTED, 2),
        repeated(5, (60,)),
        Forward(3),
    )
    assert session.text == (*AFTER_FIRST, 60)
    assert session.state.kept is None


@pytest.mark.parametrize("waits", [True, False])
def test_where_one_waits_it_is_judged_by_the_kept_row(waits: bool) -> None:
    session = idle(CHOSEN, LOSSY_ON).is_told(first(True))
    session.pass_begins()
    if waits:
        session.is_told(second(True))
    *_, forward = session.ran(0, 0, 60)
    assert forward == Forward(3)
    assert session.text == (AFTER_FIRST if waits else (*AFTER_FIRST, 60))
    assert (session.pass_begins().prehit is not None) is waits


def test_at_the_end_of_the_lease_the_row_is_kept() -> None:
    session = idle(CHOSEN, LOSSY_ON, lease=2).is_told(first(True))
    assert session.ran(0, 0, 60)[-1] == Reported(1, Outcome.ACCEPTED, 2)
    assert session.state.kept is not None
    session.tell(second(True, acknowledged=5))
    assert session.pass_begins().prehit is not None


def test_reopened_the_kept_row_is_gone() -> None:
    session = kept().is_told(OpenArrived(msgspec.structs.replace(CHOSEN, incarnation=2), 2))
    assert session.state.kept is None


def test_a_window_rejected_at_pre_hit_is_reported_with_expected_length_zero() -> None:
    session = kept().is_told(arrives(window((70, 71), AFTER_FIRST, True, number=2), 101.0))
    session.prehit_failed(60)
    report = window_report(session.judged[-1], Whose("s1", 1, "edge-1", "c1", "plc"))
    assert (report.expected_accepted, report.num_drafted) == (0.0, 2)
    assert report.mean_jsd is not None
    assert 0 < report.mean_jsd < 1


def test_a_kept_row_lets_a_token_pass_as_a_pass_would() -> None:
    plan = kept().is_told(second(True)).pass_begins()
    assert plan.prehit is not None
    assert plan.prehit.test.passes(row(60))  # the rule
    failing = kept().is_told(arrives(window((70,), AFTER_FIRST, True, number=2))).pass_begins()
    assert failing.prehit is not None
    assert [failing.prehit.test.passes(row(own)) for own in (70, 60)] == [True, False]
