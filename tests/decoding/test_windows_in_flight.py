"""The machines with several windows in flight, which lockstep never has."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bus.protocol.messages import DraftWindow, OpenSession, Outcome
from decoding import edge, methods
from decoding.edge_events import Commit, Crop, Draft, FeedbackArrived, Send
from decoding.methods.base import Flow, PaceView
from decoding.sampling import SamplingParams
from tests.decoding.edge_session import (
    EOS,
    READY,
    SPEC,
    START,
    Edge,
    drafted,
    feedback,
)
from tests.decoding.edge_session import (
    window as awaited_window,
)
from tests.decoding.test_pair import fates, pairs, windows
from tests.harness import EdgeCloudPair, Fate
from tests.toy import ToyPair

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=11)


def window(start: int, tokens: tuple[int, ...], **changes: Any) -> DraftWindow:
    return awaited_window(start, tokens, awaits=False, **changes)


class ThreeAhead:
    """Drafts on while up to three windows wait; no bonus token."""

    name = "three-ahead"
    forecasts = False

    def flow(self, view: PaceView) -> Flow:
        return Flow(message=view.window, budget=3 * view.window, awaits=False)


AHEAD = dataclasses.replace(methods.sd.METHOD, name="ahead", pace=ThreeAhead())


@settings(max_examples=25, deadline=None)
@given(
    pair=pairs, fates=fates, windows=windows, sampling=st.sampled_from([GREEDY, SAMPLED]),
    forget=st.frozensets(st.integers(0, 40), max_size=3),
)  # fmt: skip
def test_windows_in_flight_do_not_change_the_text_over_any_link(
    pair: ToyPair,
    fates: tuple[Fate, ...],
    windows: tuple[int, ...],
    sampling: SamplingParams,
    forget: frozenset[int],
) -> None:
    lockstep = EdgeCloudPair(pair, sampling, windows=(3,), prompt=(1, 0)).run()
    run = EdgeCloudPair(
        pair, sampling, windows=windows, fates=fates, forget_at=forget, prompt=(1, 0), method=AHEAD
    )
    assert run.run() == lockstep


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("agreement", [0.0, 0.7, 1.0])
def test_over_a_good_link_nothing_is_sent_twice(sampling: SamplingParams, agreement: float) -> None:
    """Windows of an epoch that is over do not leave a gap the cloud waits behind."""
    pair = ToyPair(agreement=agreement)
    run = EdgeCloudPair(pair, sampling, windows=(3,), method=AHEAD)
    run.run()
    sent = [(m.epoch, m.seq) for m in run.sent if isinstance(m, DraftWindow)]
    assert len(set(sent)) == len(sent)
    assert len([m for m in run.sent if isinstance(m, OpenSession)]) == 1


def three_in_flight() -> Edge:
    session = Edge(replace(SPEC, method=AHEAD)).is_told(START, READY)
    session.is_told(drafted(1, 3, (10, 11, 12, 13)), drafted(2, 7, (20, 21, 22, 23)))
    return session.is_told(drafted(3, 11, (30, 31, 32, 33)))


def test_drafting_goes_on_behind_the_last_drafted_token() -> None:
    session = Edge(replace(SPEC, method=AHEAD)).is_told(START, READY)
    assert session.tell(drafted(1, 3, (10, 11, 12, 13))) == (
        Send(window(3, (10, 11, 12, 13))), Draft(2, (13,), 4),
    )  # fmt: skip
    assert len(session.tell(drafted(2, 7, (20, 21, 22, 23)))) == 2
    assert session.tell(drafted(3, 11, (30, 31, 32, 33))) == (
        Send(window(11, (30, 31, 32, 33), seq=2)),
    )


def test_no_more_is_drafted_ahead_than_may_be_committed() -> None:
    session = Edge(replace(SPEC, method=AHEAD, max_new_tokens=6)).is_told(START, READY)
    assert session.tell(drafted(1, 3, (10, 11, 12, 13)))[1:] == (Draft(2, (13,), 2),)
    assert session.tell(drafted(2, 7, (20, 21)))[1:] == ()


def test_nothing_is_drafted_behind_an_end_token() -> None:
    session = Edge(replace(SPEC, method=AHEAD)).is_told(START, READY)
    assert session.tell(drafted(1, 3, (10, EOS)))[1:] == ()


def test_a_verdict_frees_its_window_and_keeps_the_later_ones() -> None:
    session = three_in_flight()
    effects = session.tell(FeedbackArrived(feedback(Outcome.ACCEPTED, 4, 7, None), 30.0))
    assert effects[0] == Commit(0, (10, 11, 12, 13), (True,) * 4)
    assert effects[2:] == (Draft(4, (33,), 4),)
    assert [flight.message.seq for flight in session.state.in_flight] == [1, 2]


def test_a_verdict_on_a_later_window_stands_for_those_before_it() -> None:
    """Feedback is cumulative: the lost one is not waited for."""
    session = three_in_flight()
    later = feedback(Outcome.ACCEPTED, 4, 11, None, seq=1)
    effects = session.tell(FeedbackArrived(later, 30.0))
    assert effects[0] == Commit(0, (10, 11, 12, 13, 20, 21, 22, 23), (True,) * 8)
    assert [flight.message.seq for flight in session.state.in_flight] == [2]


def test_a_rejection_ends_the_epoch_and_the_next_window_follows_the_rejected_one() -> None:
    session = three_in_flight()
    rejection = feedback(Outcome.PARTIAL, 1, 9, 60, seq=1)
    effects = session.tell(FeedbackArrived(rejection, 30.0))
    assert effects[0] == Commit(0, (10, 11, 12, 13, 20, 60), (True, True, True, True, True, False))
    assert effects[2:] == (Crop(8), Draft(4, (60,), 4))
    state = session.state
    assert (state.epoch, state.next_seq, state.in_flight, state.drafted) == (1, 2, (), ())
    sends = session.tell(drafted(4, 9, (40, 41, 42, 43)))
    assert isinstance(sends[0], Send)
    assert isinstance(sends[0].message, DraftWindow)
    assert (sends[0].message.epoch, sends[0].message.seq) == (1, 2)


def test_a_rejection_interrupts_the_draft_that_runs_and_its_answer_is_ignored() -> None:
    session = Edge(replace(SPEC, method=AHEAD)).is_told(START, READY)
    session.is_told(drafted(1, 3, (10, 11, 12, 13)))
    assert session.state.drafting
    effects = session.tell(FeedbackArrived(feedback(Outcome.PARTIAL, 1, 5, 60), 30.0))
    assert effects[2:] == (Crop(4), Draft(3, (60,), 4))
    before = session.state
    assert session.tell(drafted(2, 7, (20, 21))) == ()
    assert session.state == before


def test_a_move_takes_all_windows_along_in_their_order() -> None:
    session = three_in_flight().is_told(
        FeedbackArrived(feedback(Outcome.UNKNOWN_SESSION, 0, 0, None), 30.0)
    )
    assert session.state.phase is edge.Phase.OPENING
    (first, *_) = session.effects
    assert isinstance(first, Send)
    assert isinstance(first.message, OpenSession)
    assert first.message.next_seq == 0
    ready = replace(READY, message=type(READY.message)("s1", 2, "cloud-2"))
    sent = session.tell(ready)
    assert sent == (
        Send(window(3, (10, 11, 12, 13), incarnation=2)),
        Send(window(7, (20, 21, 22, 23), incarnation=2, seq=1)),
        Send(window(11, (30, 31, 32, 33), incarnation=2, seq=2)),
    )
