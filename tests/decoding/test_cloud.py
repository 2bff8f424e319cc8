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
from bus.protocol.messages import (
    FaultCode,
    Outcome,
)
from decoding import cloud
from decoding.acceptance import draw_residual
from decoding.cloud import Stage
from decoding.cloud_events import (
    Crop,
    FetchRow,
    FullRowReady,
    Prefill,
)
from decoding.engine import TargetRow
from decoding.methods.base import Proposal
from decoding.methods.exact import ExactRule
from decoding.sampling import SamplingParams, from_wire, warp
from decoding.uniforms import Purpose, uniform
from tests.decoding.cloud_session import (
    ALL_ACCEPTED,
    FIRST_PASS,
    LIMITS,
    ONE_ACCEPTED,
    OPEN,
    OPENED,
    PREFILLED,
    PROBS,
    PROMPT,
    READY,
    SAMPLED,
    SD,
    Cloud,
    Run,
    answered,
    arrives,
    feedback,
    idle,
    recovering,
    rows,
    verifying,
    window,
)

# --- (open) -----------------------------------------------------------------------------------


def test_opening_says_ready_reports_and_runs_all_but_the_last_token() -> None:
    new = Cloud()
    assert new.effects == (READY, OPENED, Prefill(job=1, tokens=(1, 2)))
    assert new.state.stage is Stage.PREFILLING
    assert (new.state.tokens, new.state.num_run) == (PROMPT, 2)


def test_committed_tokens_are_run_too() -> None:
    new = Cloud(msgspec.structs.replace(OPEN, committed=pack_tokens((7, 8))))
    assert new.effects[2] == Prefill(1, (1, 2, 3, 7))


def test_a_prompt_of_one_token_has_nothing_to_run_yet() -> None:
    new = Cloud(msgspec.structs.replace(OPEN, prompt=pack_tokens((1,))))
    assert new.effects[2] == Prefill(1, ())
    assert new.state.num_run == 0


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
    assert new.state.stage is Stage.IDLE


def test_a_window_that_came_while_prefilling_is_run_then() -> None:
    new = Cloud()
    assert new.tell(arrives(window())) == ()
    assert new.tell(PREFILLED) == (FIRST_PASS,)


# --- IDLE, WindowArrived, expected ------------------------------------------------------------


def test_at_temperature_zero_the_pass_runs_the_last_verified_token_and_the_whole_window() -> None:
    session = idle()
    assert session.tell(arrives(window())) == (FIRST_PASS,)
    assert session.state.stage is Stage.VERIFYING


def test_above_temperature_zero_the_last_drafted_token_is_judged_and_not_run() -> None:
    assert idle(SAMPLED).tell(arrives(window())) == (
        Run(2, (3, 10, 11), ((10, 0), (11, 0), (12, 0))),
    )


def test_a_window_of_one_token_above_temperature_zero_runs_the_last_verified_token() -> None:
    assert idle(SAMPLED).tell(arrives(window(tokens=(10,)))) == (Run(2, (3,), ((10, 0),)),)


def test_rows_are_asked_at_the_ids_that_were_sent() -> None:
    """`p_at_q` stands beside the window's row, so q₁, which drops its zeros, is a prefix of it."""
    message = window(
        tokens=(10,), q_ids=pack_tokens((10, 0, 3, 4)),
        q_probs=np.array([0.5, 0.25, 0.25, 0.0], dtype="<f2").tobytes(),
    )  # fmt: skip
    assert idle(SAMPLED).tell(arrives(message)) == (Run(2, (3,), ((10, 0, 3, 4),)),)


# --- VERIFYING, RowsReady ---------------------------------------------------------------------


def test_a_full_acceptance_commits_the_targets_next_token_too() -> None:
    session = verifying()
    assert session.tell(rows(2, 10, 11, 12, 50)) == answered(ALL_ACCEPTED)
    assert session.state.tokens == (1, 2, 3, 10, 11, 12, 50)
    assert session.state.num_run == 6
    assert (session.state.epoch, session.state.next_seq) == (0, 1)
    assert session.tell(arrives(window(7, (20,), seq=1))) == (Run(3, (50, 20), ((20, 0), ())),)


def test_a_rejection_crops_commits_the_argmax_and_raises_the_epoch() -> None:
    session = verifying()
    assert session.tell(rows(2, 10, 60, 12, 50)) == (Crop(4), *answered(ONE_ACCEPTED))
    assert session.state.tokens == (1, 2, 3, 10, 60)
    assert session.state.num_run == 4
    assert (session.state.epoch, session.state.next_seq) == (1, 1)
    assert session.state.stage is Stage.IDLE
    effects = session.tell(arrives(window(5, (20,), epoch=1, seq=1)))
    assert effects == (Run(3, (60, 20), ((20, 0), ())),)


def test_nothing_accepted_crops_to_the_text_before_the_window() -> None:
    effects = verifying().tell(rows(2, 60, 11, 12, 50))
    assert effects == (Crop(3), *answered(feedback(Outcome.PARTIAL, 0, 4, 60)))


def test_above_temperature_zero_a_full_acceptance_commits_no_bonus_and_crops_nothing() -> None:
    session = verifying(SAMPLED)
    effects = session.tell(rows(2, 0, 0, 0, p=(1.0, 1.0, 1.0)))
    assert effects == answered(feedback(Outcome.ACCEPTED, 3, 6, None, pass_tokens=3))
    assert (session.state.tokens, session.state.num_run) == ((1, 2, 3, 10, 11, 12), 5)
    effects = session.tell(arrives(window(6, (20, 21), seq=1)))
    assert effects == (Run(3, (12, 20), ((20, 0), (21, 0))),)


def test_the_rule_judges_each_token_at_its_position_until_one_falls() -> None:
    seen: list[tuple[int, int, float]] = []

    class Rule(ExactRule):
        def accepts(
            self,
            proposal: Proposal,
            row: TargetRow,
            params: SamplingParams,
            position: int,
            threshold: float,
        ) -> bool:
            seen.append((proposal.token, position, threshold))
            return proposal.token != 11

    session = Cloud(OPEN, dataclasses.replace(SD, acceptance=Rule())).is_told(PREFILLED)
    session.is_told(arrives(window()), rows(2, 1, 2, 3, 4))
    assert seen == [(10, 3, 0.1), (11, 4, 0.1)]


@pytest.mark.parametrize(
    ("asked", "given"), [(0.1, 0.1), (0.9, 0.3), (0.3, 0.3), (-0.9, -0.5), (-0.5, -0.5)]
)
def test_thresholds_are_clipped_to_the_operators_bounds(asked: float, given: float) -> None:
    judged_by: list[float] = []

    class Rule(ExactRule):
        def accepts(self, *args: Any) -> bool:
            judged_by.append(args[-1])
            return True

    session = Cloud(OPEN, dataclasses.replace(SD, acceptance=Rule())).is_told(PREFILLED)
    session.is_told(arrives(window(tokens=(10,), threshold=asked)))
    (send, _) = session.tell(rows(2, 1, 2))
    assert judged_by == [given]
    assert send.message.threshold == given


@pytest.mark.parametrize(("arrived_ms", "queue_ms"), [(100.0, 5.0), (105.0, 0.0), (106.0, 0.0)])
def test_queueing_is_what_was_neither_transport_nor_verification(
    arrived_ms: float, queue_ms: float
) -> None:
    session = idle().is_told(arrives(window(), now_ms=arrived_ms))
    (send, _) = session.tell(rows(2, 10, 11, 12, 50, now_ms=115.0))
    assert (send.message.verify_ms, send.message.queue_ms) == (10.0, queue_ms)


# --- … rejected, sampled; RECOVERING, FullRowReady --------------------------------------------


def test_a_sampled_rejection_fetches_the_row_it_fell_on() -> None:
    session = verifying(SAMPLED)
    assert session.tell(rows(2, 0, 0, 0, p=(1.0, 0.0, 1.0))) == (FetchRow(job=2, index=1),)
    assert session.state.stage is Stage.RECOVERING
    assert session.state.tokens == PROMPT


def test_the_recovered_token_is_drawn_from_the_residual_at_its_position() -> None:
    target = np.full(100, 0.01)
    q = warp(from_wire(np.array([11, 0], np.int32), PROBS), SamplingParams(1.0, seed=5))
    token = draw_residual(target, q, uniform(5, 4, Purpose.RESIDUAL))
    session = recovering()
    assert session.tell(FullRowReady(2, target, 120.0)) == (
        Crop(4), *answered(feedback(Outcome.PARTIAL, 1, 5, token, pass_tokens=3)),
    )  # fmt: skip
    assert session.state.tokens == (1, 2, 3, 10, token)
    assert (session.state.epoch, session.state.num_run) == (1, 4)


def test_a_rejected_last_token_was_never_run_so_nothing_is_cropped() -> None:
    session = verifying(SAMPLED).is_told(rows(2, 0, 0, 0, p=(1.0, 1.0, 0.0)))
    effects = session.tell(FullRowReady(2, np.eye(100)[77], 120.0))
    assert effects == answered(feedback(Outcome.PARTIAL, 2, 6, 77, pass_tokens=3))
    assert session.state.num_run == 5


def test_a_window_that_comes_while_recovering_is_judged_stale() -> None:
    session = recovering().is_told(arrives(window(6, (20,), seq=1)))
    session.is_told(FullRowReady(2, np.eye(100)[77], 120.0))
    assert session.state.stage is Stage.IDLE
    assert session.state.held == ()
