"""The target that goes on by itself: its lease, its ends, and the windows it has overtaken."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from bus.protocol.messages import Outcome
from decoding.cloud_events import Crop, Forward, ReportOwn
from decoding.cloud_state import LEASE_TOKENS, LEAST_LEASE
from decoding.methods import Method
from decoding.verification import OWN_PASSES, OwnPasses, window_report
from decoding.verification import Reported as Whose
from tests.decoding.cloud_session import (
    CHOSEN,
    LOSSY_ON,
    OPEN,
    PREFILLED,
    PROMPT,
    RESIDUAL,
    RUNS_ON,
    Cloud,
    Reported,
    acked,
    arrives,
    feedback,
    idle,
    row,
    window,
)

LONG = msgspec.structs.replace(OPEN, max_new_tokens=2000)
OWN = (50, 51)


def alone(message: Any = OPEN, method: Method = RUNS_ON, **limits: Any) -> Cloud:
    """The target has written 50 and 51 by itself; its third pass has been asked for."""
    return idle(message, method, **limits).writes(*OWN)


# --- a pass without a draft -------------------------------------------------------------------


def test_once_prefilled_it_runs_the_last_token_alone() -> None:
    session = Cloud(CHOSEN, RUNS_ON)
    assert session.tell(PREFILLED) == (Forward(2),)
    plan = session.pass_begins()
    assert (plan.feed, plan.path, plan.choices_at) == ((3,), (), (3,))
    assert session.ran(50) == (
        feedback(3, (50,), number=None, held_ms=0.0, queue_ms=0.0, pass_tokens=1), Forward(3),
    )  # fmt: skip
    assert session.pass_begins().feed == (50,)


def test_it_tells_the_edge_only_what_it_has_not_told() -> None:
    session = alone()
    send, _ = session.ran(52)
    assert (send.message.start, send.message.token_ids) == (5, (52,))
    assert session.state.sent_length == 6


@pytest.mark.parametrize("message", [OPEN, CHOSEN, RESIDUAL])
def test_drafts_that_come_before_the_pass_begins_are_verified_in_it(message: Any) -> None:
    session = alone(message)
    rows = not session.state.sampling.coupled
    assert session.tell(arrives(window((20,), (*PROMPT, *OWN), rows))) == ()
    assert session.pass_begins().feed == (51, 20)


@pytest.mark.parametrize("greedy", [True, False])
def test_passes_without_drafts_are_reported_in_sums(greedy: bool) -> None:
    session = idle(LONG if greedy else msgspec.structs.replace(LONG, temperature=1.0), RUNS_ON)
    session.state = msgspec.structs.replace(
        session.state, limits=msgspec.structs.replace(session.state.limits, context_length=4096)
    )
    for number in range(1, 2 * OWN_PASSES + 1):
        session.is_told(acked(len(session.text), number=number))
        reports = [e for e in session.ran(50, share=0.5) if isinstance(e, ReportOwn)]
        assert len(reports) == (number % OWN_PASSES == 0)
        for report in reports:
            own = report.own
            assert (own.num_tokens, own.model_ms) == (OWN_PASSES, OWN_PASSES * 5.0)
            assert own.num_scored == (OWN_PASSES if greedy else 0)
            log_half = np.log(0.5) if greedy else 0.0
            assert own.log_likelihood == pytest.approx(OWN_PASSES * log_half)
            assert session.state.own == OwnPasses()


# --- the lease --------------------------------------------------------------------------------


def test_it_stops_when_the_edge_has_not_acknowledged_for_so_many_tokens() -> None:
    session = idle(OPEN, RUNS_ON, lease=3).writes(50, 51)
    assert session.effects[-1] == Forward(4)
    (send,) = session.ran(52)
    assert send.message.token_ids == (52,)
    assert session.state.stage.name == "idle"


@pytest.mark.parametrize(
    ("event", "goes_on"),
    [
        (acked(3), False),
        (acked(4), True),
        (acked(6), True),
        (arrives(window((20,), (*PROMPT, 9), acknowledged=4)), True),  # after another text
        (arrives(window((20,), (*PROMPT, 9), acknowledged=3)), False),
        (arrives(window((52, 20), (*PROMPT, 50, 51), acknowledged=3)), True),  # it continues
    ],
)
def test_it_goes_on_when_more_is_acknowledged_or_a_draft_comes(event: Any, goes_on: bool) -> None:
    session = idle(OPEN, RUNS_ON, lease=3).writes(50, 51, 52)
    assert session.tell(event) == ((Forward(5),) if goes_on else ())


def test_one_that_asks_is_answered_before_the_next_pass() -> None:
    session = idle(OPEN, RUNS_ON, lease=3).writes(50, 51, 52)
    send, forward = session.tell(acked(4, again=True))
    assert (send.message.start, send.message.token_ids) == (4, (51, 52))
    assert forward == Forward(5)


@pytest.mark.parametrize(
    ("verify_ms", "lease"),
    [
        (5000.0, LEAST_LEASE),
        (250.0, LEAST_LEASE),
        (100.0, 20),
        (40.0, 50),
        (1.0, LEASE_TOKENS),
        (0.0, LEASE_TOKENS),
    ],
)
def test_the_lease_is_two_seconds_of_passes_within_bounds(verify_ms: float, lease: int) -> None:
    session = idle(LONG, RUNS_ON, context_length=4096)
    assert session.state.lease == LEAST_LEASE  # before the first pass
    while session.state.stage.name == "verifying":
        session.ran(50, verify_ms=verify_ms)
    assert len(session.text) - len(PROMPT) == lease


def test_the_lease_follows_how_long_passes_take() -> None:
    session = idle(LONG, RUNS_ON, context_length=4096).has_run(50, verify_ms=10.0)
    assert session.state.lease == 200
    for _ in range(40):
        session.is_told(acked(len(session.text))).has_run(50, verify_ms=100.0)
    assert 20 <= session.state.lease <= 21


def test_the_operators_bound_counts_from_the_beginning() -> None:
    assert idle(OPEN, RUNS_ON, lease=1).ran(50) == (
        feedback(3, (50,), number=None, held_ms=0.0, queue_ms=0.0, pass_tokens=1),
    )


# --- its ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "limits", "length"),
    [
        (OPEN, {"eos": frozenset({51})}, 5),
        (msgspec.structs.replace(OPEN, max_new_tokens=2), {}, 5),
        (OPEN, {"context_length": 5}, 5),
        (OPEN, {}, 6),
    ],
    ids=["eos", "max_new_tokens", "context", "none"],
)
def test_nothing_is_written_after_the_end(message: Any, limits: Any, length: int) -> None:
    session = idle(message, RUNS_ON, **limits).writes(*OWN)
    if length == 5:
        assert session.state.ended
        assert session.tell(acked(5)) == ()
        assert Forward(4) not in session.tell(arrives(window((20,), session.text)))
        assert session.state.stage.name == "idle"
    else:
        assert session.writes(52).effects[-1] == Forward(5)


def test_an_end_token_of_the_prompt_or_the_lossy_kept_row_counts_as_everywhere() -> None:
    eos = frozenset({3, 60})
    session = idle(CHOSEN, LOSSY_ON, eos=eos)
    assert not session.state.ended  # the prompt ends in token 3
    session.is_told(arrives(window((10, 11), rows=True)))
    *_, committed = session.ran(0, 0, 60)
    assert committed.message.token_ids == (60,)  # the kept row's own, and no pass after it
    assert session.state.ended


# --- windows that come late -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "outcome", "num_accepted"),
    [
        ((50,), Outcome.ACCEPTED, 1),
        ((50, 51), Outcome.ACCEPTED, 2),
        ((50, 20, 21), Outcome.PREHIT_REJECTED, 1),
        ((20,), Outcome.PREHIT_REJECTED, 0),
        ((20, 51), Outcome.PREHIT_REJECTED, 0),
    ],
)
def test_one_that_the_text_has_passed_or_contradicts_is_judged_by_the_text(
    tokens: tuple[int, ...], outcome: Outcome, num_accepted: int
) -> None:
    """Tokens that the target reached first and that agree count as accepted."""
    session = alone()
    before = session.state
    assert session.tell(arrives(window(tokens), 130.0)) == (
        Reported(1, outcome, num_accepted, reached=num_accepted),
    )
    (judged,) = session.judged
    assert (judged.rows, judged.own, judged.verify_ms, judged.queue_ms) == ((), None, 0.0, 0.0)
    report = window_report(judged, Whose("s1", 1, "edge-1", "c1", "auto"))
    assert report.expected_accepted == num_accepted
    assert (report.num_drafted, report.num_own) == (len(tokens), 0)
    assert (report.num_scored, report.verify_ms, report.cloud_ms) == (0, 0.0, 0.0)
    assert session.state.drafts == before.drafts
    assert session.tell(arrives(window(tokens), 140.0))[0].message.token_ids == OWN


@pytest.mark.parametrize("rows", [False, True])
def test_of_one_that_is_partly_overtaken_the_rest_is_verified(rows: bool) -> None:
    session = alone()
    assert session.tell(arrives(window((50, 51, 20, 21), rows=rows))) == ()
    plan = session.pass_begins()
    assert plan.feed == (51, 20, 21)
    assert session.ran(20, 60, 0) == (
        Crop(6),
        feedback(5, (20, 60), pass_tokens=3),
        Reported(1, Outcome.PARTIAL, 3, own=60, reached=2),
        Forward(5),
    )
    (judged,) = session.judged
    assert len(judged.rows) == 3
    report = window_report(judged, Whose("s1", 1, "edge-1", "c1", "auto"))
    # With rows: 1 for each token reached, then the overlaps of ½ 20 + ¼ 0 with ¾ 20 + ¼ 0.
    expected = 2 + 0.75 + 0.75**2 if rows else 3
    assert report.expected_accepted == expected
    assert (report.num_accepted, report.num_own, report.num_drafted) == (3, 1, 4)
    assert report.num_scored == 2


@pytest.mark.parametrize(
    ("own", "outcome", "num_accepted"),
    [(52, Outcome.ACCEPTED, 3), (53, Outcome.PREHIT_REJECTED, 2)],
)
def test_one_that_comes_during_the_pass_is_judged_by_what_that_writes(
    own: int, outcome: Outcome, num_accepted: int
) -> None:
    session = alone()
    session.pass_begins()
    assert session.tell(arrives(window((*OWN, 52)), 112.0)) == ()
    send, report, forward = session.ran(own)
    assert send.message.token_ids == (own,)
    assert send.message.prehit is (own != 52)
    assert report == Reported(1, outcome, num_accepted, reached=num_accepted)
    assert forward == Forward(5)
    assert session.state.drafts.windows == ()


def test_one_that_comes_during_the_pass_and_agrees_goes_on_being_useful() -> None:
    session = alone()
    session.pass_begins()
    session.is_told(arrives(window((*OWN, 52, 20)), 112.0))
    assert session.ran(52)[-1] == Forward(5)
    assert session.pass_begins().feed == (52, 20)


@pytest.mark.parametrize("after", [(9,), (50, 9), (51,)])
def test_a_late_one_after_another_text_is_dropped_without_a_word(after: tuple[int, ...]) -> None:
    session = alone()
    assert session.tell(arrives(window((20, 21), (*PROMPT, *after)))) == ()
    assert session.state.drafts.windows == ()
    assert session.judged == []


def test_a_window_during_the_prompt_is_judged_like_any_other() -> None:
    session = Cloud(OPEN, RUNS_ON).is_told(arrives(window((50, 60))), PREFILLED)
    assert session.pass_begins().feed == (3, 50, 60)


def test_a_residual_draft_that_was_overtaken_goes_on_from_the_kept_row() -> None:
    session = idle(RESIDUAL, RUNS_ON, lease=1)
    session.is_told(arrives(window((10, 11), rows=True)))
    session.ran(0, 0, 60, p=(1.0, 1.0))
    assert session.state.kept is not None  # beyond the lease
    session.is_told(arrives(window((11, 20), (*PROMPT, 10), True, number=2)))
    plan = session.pass_begins()
    assert plan.prehit is not None
    assert plan.prehit.test.proposal.token == 20
    assert plan.prehit.test.passes(row(0, p=1.0))


# --- branches ---------------------------------------------------------------------------------


def branch(tokens: tuple[int, ...], number: int) -> Any:
    return msgspec.structs.replace(window(tokens, (*PROMPT, *OWN), number=number), branch=True)


@pytest.mark.parametrize("branch_first", [True, False])
def test_a_pass_verifies_the_drafts_first_choice(branch_first: bool) -> None:
    chain = window((52, 60), (*PROMPT, *OWN))
    both = [branch((20, 21, 22), 2), chain] if branch_first else [chain, branch((20, 21, 22), 2)]
    session = alone().is_told(*map(arrives, both))
    assert session.pass_begins().feed == (51, 52, 60)


def test_where_that_is_rejected_the_next_pass_has_the_branch() -> None:
    session = alone().is_told(arrives(window((52, 60), (*PROMPT, *OWN))))
    session.is_told(arrives(branch((20, 21, 22), 2)))
    session.pass_begins()
    assert session.ran(20, 0, 0)[-1] == Forward(5)
    assert session.pass_begins().feed == (20, 21, 22)


@pytest.mark.parametrize("late", [True, False])
def test_a_branch_that_the_text_has_not_taken_is_no_error_of_the_drafts(late: bool) -> None:
    session = alone().is_told(arrives(window((52,), (*PROMPT, *OWN))))
    other = arrives(branch((20, 21), 2))
    if not late:
        session.tell(other)
    session.pass_begins()
    session.ran(52, 53)
    if late:
        session.tell(other)
    assert [judged.window.message.number for judged in session.judged] == [1]
    assert session.state.drafts.windows == ()
