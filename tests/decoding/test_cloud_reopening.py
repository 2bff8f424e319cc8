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
    Feedback,
    OpenSession,
    Outcome,
    SessionOpened,
    SessionReady,
)
from decoding.cloud import Stage
from decoding.cloud_events import (
    Crop,
    Event,
    FetchRow,
    FullRowReady,
    OpenArrived,
    Prefill,
    Prefilled,
    Report,
    Send,
)
from tests.decoding.cloud_session import (
    OPEN,
    PREFILLED,
    PROMPT,
    READY,
    SAMPLED,
    Cloud,
    Run,
    after_rejection,
    arrives,
    idle,
    recovering,
    rows,
    verifying,
    window,
)

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
