"""The cloud's machine opened again, and given anything in any order."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.arrays import pack_tokens, unpack_tokens
from bus.protocol.codec import decode, encode
from bus.protocol.messages import (
    FaultCode,
    Feedback,
    OpenSession,
    SessionOpened,
    SessionReady,
)
from decoding import cloud
from decoding.cloud_events import (
    Crop,
    Event,
    FetchRow,
    Forward,
    FullRowReady,
    OpenArrived,
    Prefill,
    Prefilled,
    PrehitFailed,
    Report,
    RowsReady,
    Send,
)
from decoding.methods import Method
from decoding.verification import Plan
from tests.decoding.cloud_session import (
    AHEAD,
    CHOSEN,
    LOSSY_ON,
    OPEN,
    PREFILLED,
    PROMPT,
    READY,
    RESIDUAL,
    RUNS_ON,
    SD,
    Cloud,
    Reported,
    acked,
    after_rejection,
    arrives,
    idle,
    recovering,
    row,
    verifying,
    window,
)

# --- any, OpenArrived -------------------------------------------------------------------------

STAGES = [Cloud, idle, verifying, recovering, after_rejection]


@pytest.mark.parametrize("session", STAGES)
def test_opened_again_it_says_ready_again_with_the_handle_it_has(session: Any) -> None:
    told = session()
    before = told.state
    message = msgspec.structs.replace(OPEN, incarnation=told.state.incarnation)
    assert told.tell(OpenArrived(message, 7)) == (READY,)
    assert told.state is before
    assert cloud.check_reopen(before.incarnation, message) is None


@pytest.mark.parametrize("session", STAGES)
def test_an_older_incarnation_opens_nothing_and_is_told_why(session: Any) -> None:
    told = session()
    before = told.state
    older = msgspec.structs.replace(OPEN, incarnation=0)
    assert told.tell(OpenArrived(older, 7)) == ()
    assert told.state is before
    fault = cloud.check_reopen(before.incarnation, older)
    assert fault is not None
    assert fault.code is FaultCode.STALE_INCARNATION
    assert decode(encode(fault)) == fault


def reopening(committed: tuple[int, ...], **changes: Any) -> OpenSession:
    plain = msgspec.structs.replace(OPEN, incarnation=2, committed=pack_tokens(committed))
    return msgspec.structs.replace(plain, **changes)


READY_2 = Send(SessionReady("s1", 2, "cloud-1", 7))
OPENED_2 = Report(SessionOpened("s1", "c1", "edge-1", "cloud-1", "sd", 2))


@pytest.mark.parametrize(
    ("committed", "crop", "prefill"),
    [
        ((10, 60), 4, ()),  # the same text: all but its last token is in the cache
        ((10, 60, 61, 62), 4, (60, 61)),  # the edge knows more than we do
        ((10,), 3, ()),  # our last feedback never arrived
        ((), 2, ()),
        ((77, 78), 3, (77,)),  # another text altogether
    ],
)
def test_a_higher_incarnation_keeps_the_common_prefix_and_runs_the_rest(
    committed: tuple[int, ...], crop: int, prefill: tuple[int, ...]
) -> None:
    session = after_rejection().is_told(arrives(window((1,), (*PROMPT, *range(9)), number=2)))
    assert session.state.drafts.windows
    effects = session.tell(OpenArrived(reopening(committed), 7))
    assert effects == (Crop(crop), READY_2, OPENED_2, Prefill(3, prefill))
    state = session.state
    assert state.tokens == PROMPT + committed
    assert state.num_run == len(state.tokens) - 1
    assert (state.incarnation, state.handle) == (2, 7)
    assert state.acknowledged == state.sent_length == len(state.tokens)
    assert (state.drafts.windows, state.judged, state.kept, state.heard) == ((), (), None, None)


def test_its_hashes_are_those_of_the_new_text() -> None:
    session = after_rejection().is_told(OpenArrived(reopening((77, 78)), 7), Prefilled(3, 99.0))
    assert session.tell(arrives(window((20,), (*PROMPT, 77, 78)))) == (Forward(4),)


def test_another_prompt_is_another_beginning() -> None:
    """Hashes begin with the prompt, and so does what may be acknowledged."""
    message = reopening((60,), prompt=pack_tokens((*PROMPT, 10)), max_new_tokens=2)
    session = after_rejection().is_told(OpenArrived(message, 7), Prefilled(3, 99.0))
    assert (session.state.num_prompt, session.state.end) == (4, 6)
    follows = window((20,), (*PROMPT, 10, 60), num_prompt=4)
    assert session.tell(arrives(follows)) == (Forward(4),)


def test_a_session_may_come_back_from_another_edge() -> None:
    session = idle().is_told(OpenArrived(reopening((), edge="edge-2"), 7))
    assert session.state.edge == "edge-2"
    assert Report(SessionOpened("s1", "c1", "edge-2", "cloud-1", "sd", 2)) in session.effects


@pytest.mark.parametrize(
    ("session", "late"),
    [
        (Cloud, PREFILLED),
        (verifying, RowsReady(2, Plan(), (), 10.0, 115.0)),
        (verifying, PrehitFailed(2, Plan(), row(1), 115.0)),
        (recovering, FullRowReady(2, np.full(100, 0.01), 120.0)),
    ],
)
def test_what_the_model_says_about_the_life_before_is_ignored(session: Any, late: Event) -> None:
    told = session().is_told(OpenArrived(reopening(()), 7))
    before = told.state
    assert told.tell(late) == ()
    assert told.state is before
    assert told.state.stage == cloud.Prefilling()


@pytest.mark.parametrize("session", [verifying, recovering, after_rejection])
def test_a_window_that_moved_is_judged_anew_though_the_life_before_had_it(session: Any) -> None:
    told = session().is_told(OpenArrived(reopening(()), 7))
    told.is_told(Prefilled(told.state.job, 200.0))
    rows = not told.state.sampling.coupled
    assert isinstance(told.tell(arrives(window(rows=rows, handle=7)))[0], Forward)
    assert told.pass_begins().feed[:2] == (3, 10)


def test_reopened_while_a_pass_runs_it_crops_what_that_pass_will_have_run() -> None:
    """The pass ends before the crop; unverified tokens may be in the cache then."""
    session = verifying()
    effects = session.tell(OpenArrived(reopening((10, 11, 60, 61)), 7))
    assert effects == (Crop(2), READY_2, OPENED_2, Prefill(3, (3, 10, 11, 60)))


def test_one_that_runs_on_does_so_after_reopening() -> None:
    session = idle(OPEN, RUNS_ON).writes(50, 51)
    session.is_told(OpenArrived(reopening((50, 51)), 7))
    assert session.tell(Prefilled(session.state.job, 200.0)) == (Forward(session.state.job),)
    assert session.pass_begins().feed == (51,)


# --- anything, in any order -------------------------------------------------------------------

some_tokens = st.lists(st.sampled_from([10, 11, 50]), min_size=1, max_size=3).map(tuple)
any_event: st.SearchStrategy[Any] = st.one_of(
    st.tuples(st.just("window"), st.integers(0, 9), st.booleans(), some_tokens, st.integers(1, 9)),
    st.tuples(st.just("ack"), st.integers(0, 9), st.booleans()),
    st.just("ready"),
    st.just("ready"),
    st.just("begin"),
    st.builds(
        lambda i, committed: OpenArrived(
            msgspec.structs.replace(OPEN, incarnation=i, committed=pack_tokens(committed)), 5
        ),
        st.integers(0, 2), some_tokens,
    ),
)  # fmt: skip


class AnyOrder(Cloud):
    """A session with its model and its cache; checks after each event what must hold."""

    def __init__(self, message: OpenSession, method: Method, accepted: list[bool]) -> None:
        super().__init__(
            message,
            method,
            msgspec.structs.replace(
                cloud.Limits(
                    vocab_size=100, context_length=64, threshold_min=-0.5, threshold_max=0.3
                ),
                lease=3,
            ),
        )
        self.accepted, self.given = accepted, 0
        self.cache: tuple[int, ...] = ()
        self.pending: list[Event] = []
        self.running: Forward | None = None
        self.reported: set[tuple[int, int]] = set()
        self.run_effects()

    def happens(self, happening: Any) -> None:
        before, length = self.state, len(self.text)
        match happening:
            case "ready":
                self.begin()
                self.effects = self.tell(self.pending.pop(0)) if self.pending else ()
            case "begin":
                self.effects = ()
                self.begin()
            case ("window", at, true, tokens, number):
                after = (self.text * 2)[: 3 + at] if true else (*PROMPT, *(9,) * at)
                rows = self.state.method.needs_rows(self.state.sampling)
                self.tell(arrives(window(tokens, after, rows, number=number)))
            case ("ack", back, again):
                self.tell(acked(max(length - back, 3), again=again))
            case _:
                self.tell(happening)
        self.run_effects()
        self.check(before)

    def begin(self) -> None:
        """The model is free: the pass that was asked for begins, and ends some time."""
        if self.running is None:
            return
        job, self.running = self.running.job, None
        plan = cloud.plan(self.state, Forward(job))
        rows = tuple(self.row() for _ in range(len(plan.row_ids) + (plan.prehit is not None)))
        if plan.prehit is not None and not plan.prehit.test.passes(rows[0]):
            self.pending.append(PrehitFailed(job, plan, rows[0], 0.0))
            return
        self.cache += plan.feed
        self.pending.append(RowsReady(job, plan, rows, 1.0, 0.0))

    def row(self) -> Any:
        self.given += 1
        stands = self.accepted[self.given % len(self.accepted)]
        return row((10, 11, 50)[self.given % 3], float(stands))

    def run_effects(self) -> None:
        for effect in self.effects:
            match effect:
                case Prefill(job, tokens):
                    self.cache += tokens
                    self.pending.append(Prefilled(job, 0.0))
                case Forward():
                    self.running = effect
                case FetchRow(job, _):
                    self.pending.append(FullRowReady(job, np.eye(100)[50], 0.0))
                case Crop(length):
                    if self.running is not None:  # it runs before the crop
                        self.begin()
                    self.cache = self.cache[:length]
                case Send(sent):
                    assert decode(encode(sent)) is not None
                    if isinstance(sent, Feedback):
                        assert sent.token_ids == self.text[sent.start :][: len(sent.token_ids)]
                case Reported(number):
                    key = (self.state.incarnation, number)
                    assert key not in self.reported, "judged twice"
                    self.reported.add(key)
        self.effects = ()

    def check(self, before: cloud.CloudState) -> None:
        state = self.state
        assert state.incarnation >= before.incarnation
        if state.incarnation == before.incarnation:
            assert state.tokens[: len(before.tokens)] == before.tokens
            assert state.acknowledged >= before.acknowledged
        assert state.tokens[:3] == PROMPT
        assert len(state.hashes) == len(state.tokens) - 2
        assert state.sent_length == len(state.tokens)
        if isinstance(state.stage, cloud.Idle):
            assert self.cache == state.tokens[: state.num_run]
            assert (state.kept is None) is (state.num_run == len(state.tokens) - 1)


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(any_event, max_size=30),
    session=st.sampled_from(
        [(OPEN, SD), (RESIDUAL, SD), (RESIDUAL, AHEAD), (CHOSEN, RUNS_ON), (RESIDUAL, RUNS_ON),
         (CHOSEN, LOSSY_ON)]
    ),
    accepted=st.lists(st.booleans(), min_size=1, max_size=5),
)  # fmt: skip
def test_no_order_of_events_breaks_the_text(
    events: list[Any], session: tuple[OpenSession, Method], accepted: list[bool]
) -> None:
    """The cache holds the text, feedback fits it, no window is judged twice."""
    told = AnyOrder(*session, accepted)
    for happening in events:
        told.happens(happening)


def test_the_text_taken_up_is_the_one_that_was_promised() -> None:
    session = idle().is_told(OpenArrived(reopening((10, 60)), 7))
    assert session.text[:3] == unpack_tokens(OPEN.prompt)
    assert session.text[3:] == (10, 60)
