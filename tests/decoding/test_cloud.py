"""The cloud's machine as conversations: an event in, the exact list of effects out.

The sections follow the table in `decoding.cloud`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.arrays import pack_tokens, unpack_tokens
from bus.protocol.codec import decode, encode
from bus.protocol.messages import (
    DraftWindow,
    FaultCode,
    Feedback,
    OpenSession,
    Outcome,
    SessionOpened,
    SessionReady,
)
from decoding import cloud, methods
from decoding.acceptance import draw_residual
from decoding.cloud import MAX_HELD, MAX_KEPT_FEEDBACKS, Stage
from decoding.cloud_events import (
    Crop,
    Event,
    FetchRow,
    Forward,
    FullRowReady,
    OpenArrived,
    Prefill,
    Prefilled,
    Report,
    ReportWindow,
    RowsReady,
    Send,
    WindowArrived,
)
from decoding.engine import TargetRow
from decoding.methods.base import Proposal
from decoding.methods.exact import ExactRule
from decoding.sampling import SamplingParams, from_wire, warp
from decoding.uniforms import Purpose, uniform

LIMITS = cloud.Limits(vocab_size=100, context_length=64, threshold_min=-0.5, threshold_max=0.3)
SD = methods.sd.METHOD
PROMPT = (1, 2, 3)
OPEN = OpenSession(
    session="s1",
    client="c1",
    edge="edge-1",
    incarnation=1,
    epoch=0,
    next_seq=0,
    method="sd",
    prompt=pack_tokens(PROMPT),
    committed=b"",
    seed=5,
    max_new_tokens=20,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    tokenizer_digest="digest",
)
SAMPLED = msgspec.structs.replace(OPEN, temperature=1.0)
READY = Send(SessionReady("s1", 1, "cloud-1"))
OPENED = Report(SessionOpened("s1", "c1", "edge-1", "cloud-1", "sd", 1))
PROBS = np.array([0.75, 0.25], dtype=np.float16)


@dataclass(frozen=True)
class Run:
    """A `Forward`, comparable."""

    job: int
    feed: tuple[int, ...]
    row_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Reported:
    """A `ReportWindow`, comparable."""

    feedback: Feedback


class Cloud:
    """A session at the cloud, told events one by one."""

    def __init__(self, message: OpenSession = OPEN, method: methods.Method = SD) -> None:
        self.state, effects = cloud.begin(message, method, "cloud-1", LIMITS)
        self.effects = comparable(effects)

    def tell(self, event: Event) -> tuple[Any, ...]:
        self.state, effects = cloud.step(self.state, event)
        self.effects = comparable(effects)
        return self.effects

    def is_told(self, *events: Event) -> Cloud:
        for event in events:
            self.tell(event)
        return self


def comparable(effects: tuple[Any, ...]) -> tuple[Any, ...]:
    def one(effect: Any) -> Any:
        match effect:
            case Forward(job, feed, row_ids):
                return Run(job, feed, tuple(tuple(ids.tolist()) for ids in row_ids))
            case ReportWindow(_, feedback):
                return Reported(feedback)
            case _:
                return effect

    return tuple(one(effect) for effect in effects)


def window(start: int = 3, tokens: tuple[int, ...] = (10, 11, 12), **changes: Any) -> DraftWindow:
    """Each token with probability 3/4, token 0 with 1/4."""
    plain = DraftWindow(
        session="s1",
        incarnation=1,
        epoch=0,
        seq=0,
        start=start,
        tokens=pack_tokens(tokens),
        q_ids=pack_tokens([i for token in tokens for i in (token, 0)]),
        q_probs=np.tile(PROBS, len(tokens)).tobytes(),
        threshold=0.1,
        control_version=0,
        draft_ms=6.0,
        edge_ms=26.0,
        rework_ms=3.0,
        rtt_ms=9.0,
        awaits=True,
    )
    return msgspec.structs.replace(plain, **changes)


def arrives(message: DraftWindow, now_ms: float = 100.0) -> WindowArrived:
    return WindowArrived(message, now_ms)


def rows(job: int, *argmaxes: int, p: tuple[float, ...] = (), now_ms: float = 115.0) -> RowsReady:
    """Rows of a pass; `p[i]` is the target's probability of the i-th drafted token."""
    at_q = [np.array([p[i], 0.1]) if i < len(p) else np.empty(0) for i in range(len(argmaxes))]
    made = tuple(
        TargetRow(argmax, np.array([0.5, 0.25]), at_q[i], 0.5) for i, argmax in enumerate(argmaxes)
    )
    return RowsReady(job, made, verify_ms=10.0, now_ms=now_ms)


def feedback(
    outcome: Outcome, num_accepted: int, length: int, next_token: int | None, **changes: Any
) -> Feedback:
    plain = Feedback(
        session="s1",
        incarnation=1,
        epoch=0,
        seq=0,
        committed_length=length,
        outcome=outcome,
        num_accepted=num_accepted,
        next_token=next_token,
        threshold=0.1,
        verify_ms=10.0,
        queue_ms=5.0,
        pass_tokens=4,
    )
    return msgspec.structs.replace(plain, **changes)


def answered(message: Feedback) -> tuple[Any, ...]:
    return Send(message), Reported(message)


PREFILLED = Prefilled(1, 50.0)
ALL_ACCEPTED = feedback(Outcome.ACCEPTED, 3, 7, 50)
ONE_ACCEPTED = feedback(Outcome.PARTIAL, 1, 5, 60)


def idle(message: OpenSession = OPEN) -> Cloud:
    return Cloud(message).is_told(PREFILLED)


def verifying(message: OpenSession = OPEN) -> Cloud:
    return idle(message).is_told(arrives(window()))


def recovering() -> Cloud:
    return verifying(SAMPLED).is_told(rows(2, 0, 0, 0, p=(1.0, 0.0, 1.0)))


def after_rejection() -> Cloud:
    """Tokens 1 2 3 10 60, epoch 1; the window was 10 11 12."""
    return verifying().is_told(rows(2, 10, 60, 7, 7))


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

FIRST_PASS = Run(2, (3, 10, 11, 12), ((10, 0), (11, 0), (12, 0), ()))


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


def test_a_window_up_to_the_end_of_the_context_is_judged() -> None:
    (run,) = idle().tell(arrives(window(tokens=tuple(range(1, 62)))))
    assert isinstance(run, Run)


def test_a_token_its_own_warped_distribution_rules_out_is_refused() -> None:
    """top_k = 1 leaves token 10 alone: nobody can have drawn 0."""
    session = idle(msgspec.structs.replace(SAMPLED, top_k=1))
    message = window(tokens=(0,), q_ids=pack_tokens((10, 0)), q_probs=PROBS.tobytes())
    (send,) = session.tell(arrives(message))
    assert send.message.code is FaultCode.BAD_TOKENS


# --- any, OpenArrived -------------------------------------------------------------------------


@pytest.mark.parametrize("session", [Cloud, idle, verifying, recovering, after_rejection])
def test_opened_again_it_says_ready_again(session: Any) -> None:
    told = session()
    before = told.state
    assert told.tell(OpenArrived(OPEN)) == (READY,)
    assert told.state is before


@pytest.mark.parametrize("session", [Cloud, idle, verifying, recovering, after_rejection])
def test_an_older_incarnation_opens_nothing(session: Any) -> None:
    told = session()
    before = told.state
    assert told.tell(OpenArrived(msgspec.structs.replace(OPEN, incarnation=0))) == ()
    assert told.state is before


def reopening(committed: tuple[int, ...], **changes: Any) -> OpenSession:
    plain = msgspec.structs.replace(
        OPEN, incarnation=2, epoch=3, next_seq=7, committed=pack_tokens(committed)
    )
    return msgspec.structs.replace(plain, **changes)


READY_2 = Send(SessionReady("s1", 2, "cloud-1"))
OPENED_2 = Report(SessionOpened("s1", "c1", "edge-1", "cloud-1", "sd", 2))


@pytest.mark.parametrize(
    ("committed", "crop", "prefill"),
    [
        ((10, 60), 4, ()),  # the same text: all but its last token is in the cache
        ((10, 60, 61, 62), 4, (60, 61)),  # the edge knows more than we do
        ((10,), 3, ()),  # our last verdict never arrived
        ((), 2, ()),
        ((77, 78), 3, (77,)),  # another text altogether
    ],
)
def test_a_higher_incarnation_keeps_the_common_prefix_and_runs_the_rest(
    committed: tuple[int, ...], crop: int, prefill: tuple[int, ...]
) -> None:
    session = after_rejection()
    effects = session.tell(OpenArrived(reopening(committed)))
    assert effects == (Crop(crop), READY_2, OPENED_2, Prefill(3, prefill))
    state = session.state
    assert state.tokens == PROMPT + committed
    assert state.num_run == len(state.tokens) - 1
    assert (state.incarnation, state.epoch, state.next_seq) == (2, 3, 7)
    assert (state.verifications, state.held, state.feedbacks, state.kept) == ((), (), (), None)


def test_a_session_may_come_back_from_another_edge() -> None:
    session = idle().is_told(OpenArrived(reopening((), edge="edge-2")))
    assert session.state.edge == "edge-2"
    assert Report(SessionOpened("s1", "c1", "edge-2", "cloud-1", "sd", 2)) in session.effects


@pytest.mark.parametrize(
    ("session", "late"),
    [
        (Cloud, PREFILLED),
        (verifying, rows(2, 10, 11, 12, 50)),
        (recovering, FullRowReady(2, np.full(100, 0.01), 120.0)),
    ],
)
def test_what_the_model_says_about_the_life_before_is_ignored(session: Any, late: Event) -> None:
    told = session().is_told(OpenArrived(reopening(())))
    before = told.state
    assert told.tell(late) == ()
    assert told.state is before
    assert told.state.stage is Stage.PREFILLING
    told.is_told(Prefilled(told.state.job, 200.0))
    moved = window(incarnation=2, epoch=3, seq=7)
    (run,) = told.tell(arrives(moved))
    assert run.feed[0] == 3


@pytest.mark.parametrize("session", [verifying, recovering])
def test_a_window_that_moved_is_judged_anew_though_the_life_before_was_judging_it(
    session: Any,
) -> None:
    told = session().is_told(OpenArrived(reopening((), epoch=0, next_seq=0)))
    assert told.state.verifications == ()
    told.is_told(Prefilled(told.state.job, 200.0))
    (run,) = told.tell(arrives(window(incarnation=2)))
    assert run.feed[:2] == (3, 10)


def test_reopened_while_a_pass_runs_it_crops_what_that_pass_will_have_run() -> None:
    """The pass ends before the crop; unverified tokens may be in the cache then."""
    session = verifying()
    effects = session.tell(OpenArrived(reopening((10, 11, 60, 61))))
    assert effects == (Crop(3), READY_2, OPENED_2, Prefill(3, (10, 11, 60)))


# --- anything, in any order -------------------------------------------------------------------

small = st.integers(0, 2)
some_tokens = st.lists(st.sampled_from([10, 11, 12]), min_size=1, max_size=3).map(tuple)
any_event: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        lambda start, tokens, i, e, s: arrives(
            window(start, tokens, incarnation=i, epoch=e, seq=s)
        ),
        st.integers(3, 8), some_tokens, small, small, small,
    ),
    st.just("expected"),
    st.just("ready"),
    st.just("ready"),
    st.builds(
        lambda i, committed: OpenArrived(
            msgspec.structs.replace(OPEN, incarnation=i, committed=pack_tokens(committed))
        ),
        small, some_tokens,
    ),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(any_event, max_size=30),
    message=st.sampled_from([OPEN, SAMPLED]),
    accepted=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_no_order_of_events_breaks_the_text(
    events: list[Any], message: OpenSession, accepted: list[bool]
) -> None:
    """The cache holds the text, verdicts fit their windows, stale things change nothing."""
    session = Cloud(message)
    cache: tuple[int, ...] = ()
    pending: list[Event] = []
    for happening in [None, *events]:
        before = session.state
        match happening:
            case None:
                pass
            case "ready":
                if pending:
                    session.tell(pending.pop(0))
            case "expected":
                state = before
                session.tell(
                    arrives(
                        window(len(state.tokens), (10, 11), incarnation=state.incarnation,
                               epoch=state.epoch, seq=state.next_seq)
                    )
                )  # fmt: skip
            case _:
                session.tell(happening)
        for effect in session.effects if happening != "ready" or session.state != before else ():
            match effect:
                case Prefill(job, tokens):
                    cache += tokens
                    pending.append(Prefilled(job, 0.0))
                case Run(job, feed, row_ids):
                    assert len(feed) >= len(row_ids) > 0
                    cache += feed
                    argmaxes = [
                        ids[0] if ids and accepted[i % len(accepted)] else 50
                        for i, ids in enumerate(row_ids)
                    ]
                    p = tuple(float(accepted[i % len(accepted)]) for i in range(len(row_ids)))
                    pending.append(rows(job, *argmaxes, p=p))
                case FetchRow(job, _):
                    pending.append(FullRowReady(job, np.eye(100)[50], 0.0))
                case Crop(length):
                    assert length <= len(cache)
                    cache = cache[:length]
                case Send(sent):
                    decode(encode(sent))
                    if isinstance(sent, Feedback) and sent.incarnation > before.incarnation:
                        assert sent.outcome is Outcome.UNKNOWN_SESSION
                case _:
                    pass
        session.effects = ()
        state = session.state
        assert state.incarnation >= before.incarnation
        if state.incarnation == before.incarnation:
            assert state.tokens[: len(before.tokens)] == before.tokens
            assert state.epoch >= before.epoch
        else:
            assert state.tokens[:3] == unpack_tokens(message.prompt)
        assert len(cache) == state.num_run
        if state.stage in (Stage.IDLE, Stage.PREFILLING):
            assert cache == state.tokens[:-1]
