"""Several windows in one pass, and the row kept between passes, as conversations.

The helpers are those of `test_cloud`; windows here are not awaited: the edge drafts on.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from bus.protocol.messages import DraftWindow, Fault, FaultCode, Outcome
from decoding import cloud
from decoding.acceptance import draw_residual
from decoding.cloud_events import (
    Crop,
    FetchRow,
    Forward,
    FullRowReady,
    OpenArrived,
    PrehitFailed,
    ReportWindow,
)
from decoding.cloud_state import MAX_PASS_TOKENS, Stage
from decoding.engine import TargetRow
from decoding.sampling import SamplingParams, from_wire, warp
from decoding.uniforms import Purpose, uniform
from decoding.verification import window_report
from tests.decoding.cloud_session import (
    LIMITS,
    OPEN,
    PREFILLED,
    PROBS,
    SAMPLED,
    Cloud,
    Run,
    answered,
    arrives,
    comparable,
    feedback,
    idle,
    rows,
)
from tests.decoding.cloud_session import window as awaited_window


def window(start: int, tokens: tuple[int, ...], **changes: Any) -> DraftWindow:
    return awaited_window(start, tokens, awaits=False, **changes)


FIRST, SECOND, THIRD = (
    arrives(window(3, (10, 11)), 100.0),
    arrives(window(5, (20, 21), seq=1), 101.0),
    arrives(window(7, (30,), seq=2), 102.0),
)


class Session(Cloud):
    """Keeps the last `Forward` as it was."""

    forward: Forward

    def is_told(self, *events: Any) -> Session:
        super().is_told(*events)
        return self

    def tell(self, event: Any) -> tuple[Any, ...]:
        self.state, effects = cloud.step(self.state, event)
        for effect in effects:
            if isinstance(effect, Forward):
                self.forward = effect
        self.effects = comparable(effects)
        return self.effects


def waiting(message: Any = OPEN) -> Session:
    """The prompt has run."""
    session = Session(message)
    session.is_told(PREFILLED)
    return session


def kept(message: Any = OPEN) -> Session:
    """Tokens 10 and 11 have been accepted, all has run, the row behind them is kept."""
    session = waiting(message)
    p = () if message is OPEN else (1.0, 1.0)
    session.is_told(FIRST, rows(2, 10, 11, 20, p=p))
    return session


# --- several windows, one pass ----------------------------------------------------------------


def test_windows_that_waited_for_the_prompt_share_one_pass() -> None:
    session = Cloud().is_told(FIRST, SECOND, THIRD)
    assert session.tell(PREFILLED) == (
        Run(2, (3, 10, 11, 20, 21, 30), ((10, 0), (11, 0), (20, 0), (21, 0), (30, 0), ())),
    )


def test_each_window_of_a_pass_has_its_own_feedback_in_order() -> None:
    session = waiting().is_told(FIRST, SECOND)
    forward = cloud.extended(session.state, session.forward)
    assert (forward.num_windows, forward.feed) == (2, (3, 10, 11, 20, 21))
    done = msgspec.structs.replace(rows(2, 10, 11, 20, 21, 30), num_windows=2)
    assert session.tell(done) == (
        *answered(feedback(Outcome.ACCEPTED, 2, 5, None, pass_tokens=5)),
        *answered(feedback(Outcome.ACCEPTED, 2, 7, None, seq=1, pass_tokens=0, queue_ms=4.0)),
    )
    assert (session.state.num_run, session.state.kept) == (7, 4)
    assert session.state.held == ()


def test_a_rejection_makes_the_later_windows_of_its_pass_stale() -> None:
    session = waiting().is_told(FIRST, SECOND, THIRD)
    done = msgspec.structs.replace(rows(2, 10, 11, 60, 21, 30, 31), num_windows=3)
    rejection = feedback(Outcome.PARTIAL, 0, 6, 60, seq=1, pass_tokens=0, queue_ms=4.0)
    assert session.tell(done) == (
        *answered(feedback(Outcome.ACCEPTED, 2, 5, None, pass_tokens=6)),
        Crop(5),
        *answered(rejection),
    )
    assert (session.state.tokens[3:], session.state.epoch) == ((10, 11, 60), 1)
    assert (session.state.held, session.state.kept) == ((), None)
    assert session.tell(THIRD)[0].message == rejection


def test_a_sampled_rejection_in_a_later_window_fetches_its_row_of_the_pass() -> None:
    session = waiting(SAMPLED).is_told(FIRST, SECOND)
    done = rows(2, 0, 0, 0, 0, 0, p=(1.0, 1.0, 1.0, 0.0))
    effects = session.tell(msgspec.structs.replace(done, num_windows=2))
    assert effects[-1] == FetchRow(2, 3)
    assert session.state.stage is Stage.RECOVERING
    target = np.full(100, 0.01)
    q = warp(from_wire(np.array([21, 0], np.int32), PROBS), SamplingParams(1.0, seed=5))
    token = draw_residual(target, q, uniform(5, 6, Purpose.RESIDUAL))
    crop, send, _ = session.tell(FullRowReady(2, target, 120.0))
    assert crop == Crop(6)
    assert (send.message.num_accepted, send.message.next_token) == (1, token)
    assert session.state.tokens == (1, 2, 3, 10, 11, 20, token)


def test_what_cannot_go_along_waits_for_its_own_turn() -> None:
    """A gap, another start, ids out of range, too many tokens: the pass holds what is before."""
    for behind in (
        window(5, (20,), seq=2),
        window(6, (20,), seq=1),
        window(5, (20,), seq=1, epoch=1),
        window(5, (200,), seq=1),
    ):
        session = waiting().is_told(FIRST, arrives(behind))
        assert cloud.extended(session.state, session.forward) is session.forward
    awaited = waiting().is_told(arrives(awaited_window(3, (10, 11))), SECOND)
    assert cloud.extended(awaited.state, awaited.forward) is awaited.forward
    limits = msgspec.structs.replace(LIMITS, context_length=4096)
    session = waiting()
    session.state = msgspec.structs.replace(session.state, limits=limits)
    tokens = tuple(1 + i % 90 for i in range(MAX_PASS_TOKENS - 1))
    session.is_told(FIRST, arrives(window(5, tokens, seq=1)))
    assert cloud.extended(session.state, session.forward) is session.forward


def test_a_faulty_window_behind_others_is_refused_when_its_turn_has_come() -> None:
    session = waiting().is_told(FIRST, arrives(window(6, (20,), seq=1)))
    effects = session.tell(rows(2, 10, 11, 20))
    assert isinstance(effects[-1].message, Fault)
    assert effects[-1].message.code is FaultCode.OUT_OF_ORDER


def test_a_pass_of_a_life_before_is_not_extended() -> None:
    session = waiting().is_told(FIRST)
    forward = session.forward
    reopened = msgspec.structs.replace(OPEN, incarnation=2)
    session.is_told(OpenArrived(reopened), arrives(window(5, (20, 21), seq=1, incarnation=2)))
    assert cloud.extended(session.state, forward) is forward


# --- the kept row -----------------------------------------------------------------------------


def test_after_a_full_acceptance_the_next_window_is_judged_from_the_kept_row_first() -> None:
    session = kept()
    assert session.tell(SECOND) == (Run(3, (20, 21), ((21, 0), ())),)
    prehit = session.forward.prehit
    assert prehit is not None
    assert (prehit.index, prehit.position, prehit.proposal.token) == (2, 5, 20)
    for argmax in (20, 60):
        row = TargetRow(argmax, np.array([0.5, 0.25]), np.empty(0), 0.5)
        assert prehit.passes(row) is (argmax == 20)
    effects = session.tell(rows(3, 20, 21, 30, now_ms=115.0))
    second = feedback(Outcome.ACCEPTED, 2, 7, None, seq=1, pass_tokens=2, queue_ms=4.0)
    assert effects == answered(second)
    assert (session.state.num_run, session.state.kept) == (7, 1)


def test_a_window_that_fails_at_pre_hit_costs_no_pass_and_brings_the_next_token() -> None:
    session = kept().is_told(SECOND, THIRD)
    row = TargetRow(60, np.array([0.5, 0.25]), np.empty(0), 0.5)
    rejection = feedback(
        Outcome.PREHIT_REJECTED, 0, 6, 60, seq=1, verify_ms=0.0, queue_ms=6.0, pass_tokens=0
    )
    assert session.tell(PrehitFailed(3, row, 107.0)) == answered(rejection)
    state = session.state
    assert (state.tokens, state.num_run) == ((1, 2, 3, 10, 11, 60), 5)
    assert (state.epoch, state.held, state.kept) == (1, (), None)
    again = arrives(window(6, (40,), epoch=1, seq=2))
    assert session.tell(again) == (Run(4, (60, 40), ((40, 0), ())),)
    assert session.forward.prehit is None


def test_above_temperature_zero_the_token_comes_from_the_kept_rows_residual() -> None:
    session = kept(SAMPLED).is_told(SECOND)
    row = TargetRow(0, np.array([0.5, 0.25]), np.array([0.0, 0.1]), 0.5)
    assert session.tell(PrehitFailed(3, row, 107.0)) == (FetchRow(3, 2),)
    target = np.full(100, 0.01)
    q = warp(from_wire(np.array([20, 0], np.int32), PROBS), SamplingParams(1.0, seed=5))
    token = draw_residual(target, q, uniform(5, 5, Purpose.RESIDUAL))
    (send, _) = session.tell(FullRowReady(3, target, 120.0))
    assert (send.message.outcome, send.message.next_token) == (Outcome.PREHIT_REJECTED, token)


def test_an_awaited_window_ends_with_the_bonus_though_it_began_from_the_kept_row() -> None:
    session = kept()
    assert session.tell(arrives(awaited_window(5, (20, 21), seq=1))) == (
        Run(3, (20, 21), ((21, 0), ())),
    )
    (send, _) = session.tell(rows(3, 20, 21, 30))
    assert (send.message.next_token, send.message.committed_length) == (30, 8)
    assert (session.state.num_run, session.state.kept) == (7, None)


@pytest.mark.parametrize(("tokens", "feed"), [((20, 21), (20,)), ((20,), (20,))])
def test_an_awaited_sampled_window_runs_something_even_from_the_kept_row(
    tokens: tuple[int, ...], feed: tuple[int, ...]
) -> None:
    session = kept(SAMPLED)
    (run,) = session.tell(arrives(awaited_window(5, tokens, seq=1)))
    assert run.feed == feed
    (send, _) = session.tell(rows(3, 0, 50, p=(1.0, 1.0)[: len(tokens)]))
    assert (send.message.num_accepted, send.message.next_token) == (len(tokens), None)
    assert session.state.num_run == 6
    assert (session.state.kept is None) is (len(tokens) == 2)


def test_reopened_the_kept_row_is_gone() -> None:
    session = kept().is_told(OpenArrived(msgspec.structs.replace(OPEN, incarnation=2)))
    assert session.state.kept is None


def test_a_window_rejected_at_pre_hit_is_reported_with_expected_length_zero() -> None:
    session = idle().is_told(FIRST, rows(2, 10, 11, 20), SECOND)
    row = TargetRow(60, np.array([0.5, 0.25]), np.empty(0), 0.5)
    _, effects = cloud.step(session.state, PrehitFailed(3, row, 107.0))
    (report,) = [effect for effect in effects if isinstance(effect, ReportWindow)]
    told = window_report(report.verification, report.feedback, "edge-1", "c1", "plc")
    assert told.expected_accepted == 0.0
    assert told.num_drafted == 2
    assert told.mean_jsd is not None
    assert 0 < told.mean_jsd < 1
