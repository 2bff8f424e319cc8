"""The machines with several windows in flight, which lockstep never has."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bus.protocol.arrays import pack_tokens
from bus.protocol.messages import DraftWindow, OpenSession, Outcome
from decoding import edge
from decoding.edge_events import Commit, Crop, Draft, Send, WindowJudged
from decoding.sampling import SamplingParams
from tests.decoding.edge_session import (
    AHEAD,
    EOS,
    OPEN,
    PROMPT,
    READY,
    RESIDUAL,
    START,
    TOKENS,
    UNKNOWN,
    Edge,
    drafted,
    opened,
    running,
    says,
    sent,
    three_in_flight,
)
from tests.decoding.test_pair import fates, pairs, windows
from tests.harness import EdgeCloudPair, Fate
from tests.toy import ToyPair

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=11)
PIPELINED = dataclasses.replace(AHEAD.method, name="ahead")
SECOND, THIRD = (20, 21, 22, 23), (30, 31, 32, 33)


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
        pair, sampling, windows=windows, fates=fates, forget_at=forget, prompt=(1, 0),
        method=PIPELINED,
    )  # fmt: skip
    assert run.run() == lockstep


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("agreement", [0.0, 0.7, 1.0])
def test_over_a_good_link_nothing_is_sent_twice(sampling: SamplingParams, agreement: float) -> None:
    pair = ToyPair(agreement=agreement)
    run = EdgeCloudPair(pair, sampling, windows=(3,), method=PIPELINED)
    run.run()
    numbers = [m.number for m in run.sent if isinstance(m, DraftWindow)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len([m for m in run.sent if isinstance(m, OpenSession)]) == 1


def test_drafting_goes_on_after_the_last_drafted_token() -> None:
    session = Edge(AHEAD).is_told(START, READY)
    assert session.tell(drafted(1, 3, TOKENS)) == (sent(), Draft(2, (13,), 4))
    assert len(session.tell(drafted(2, 7, SECOND))) == 2
    assert session.tell(drafted(3, 11, THIRD)) == (
        sent(THIRD, PROMPT + TOKENS + SECOND, number=3, acknowledged=3),
    )


def test_no_more_is_drafted_ahead_than_may_be_committed() -> None:
    session = running(replace(AHEAD, max_new_tokens=6))
    assert session.tell(drafted(1, 3, TOKENS))[1:] == (Draft(2, (13,), 2),)
    assert session.tell(drafted(2, 7, (20, 21)))[1:] == ()


def test_nothing_is_drafted_after_an_end_token() -> None:
    assert running(AHEAD).tell(drafted(1, 3, (10, EOS)))[1:] == ()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (TOKENS, [2, 3]),
        (TOKENS[:2], [1, 2, 3]),
        (TOKENS + SECOND, [3]),  # feedback between was lost: it is not waited for
        (TOKENS + SECOND[:1], [2, 3]),
        (TOKENS + SECOND + THIRD, []),
    ],
)
def test_text_that_agrees_frees_its_windows_and_keeps_the_later_ones(
    text: tuple[int, ...], left: list[int]
) -> None:
    session = three_in_flight()
    effects = session.tell(says(3, text))
    assert effects[0] == Commit(0, text, (True,) * len(text))
    assert session.windows == left
    facts = [e for e in effects if isinstance(e, WindowJudged)]
    assert sum(fact.num_committed for fact in facts) == len(text)
    assert [f.number for f in facts] == ([n for n in (1, 2, 3) if n not in left] or [0])
    assert [f.verify_ms for f in facts] == [10.0] * len(facts)
    assert [f.pass_tokens > 0 for f in facts] == [True, *[False] * (len(facts) - 1)]


def test_a_window_freed_makes_room_for_the_next() -> None:
    assert three_in_flight().tell(says(3, TOKENS))[2:] == (Draft(4, (33,), 4),)


def test_a_rejection_voids_the_later_windows() -> None:
    session = three_in_flight()
    text = (*TOKENS, 20, 60)
    effects = session.tell(says(3, text))
    assert effects[0] == Commit(0, text, (True,) * 5 + (False,))
    facts = [e for e in effects if isinstance(e, WindowJudged)]
    assert [(f.number, f.outcome, f.num_accepted, f.num_committed) for f in facts] == [
        (1, Outcome.ACCEPTED, 4, 4), (2, Outcome.PARTIAL, 1, 2),
    ]  # fmt: skip
    assert effects[-2:] == (Crop(8), Draft(4, (60,), 4))
    assert (session.state.in_flight, session.state.drafted) == ((), ())
    session.tell(drafted(4, 9, (40, 41, 42, 43)))
    (message,) = session.messages
    assert Send(message) == sent((40, 41, 42, 43), PROMPT + text, number=4, acknowledged=9)


def test_a_rejection_interrupts_the_draft_that_runs_and_its_answer_is_ignored() -> None:
    session = running(AHEAD).is_told(drafted(1, 3, TOKENS))
    assert session.state.job is not None
    effects = session.tell(says(3, (10, 60)))
    assert effects[2:] == (Crop(4), Draft(3, (60,), 4))
    before = session.state
    assert session.tell(drafted(2, 7, (20, 21))) == ()
    assert session.state == before


@pytest.mark.parametrize("prehit", [True, False])
def test_a_window_of_which_nothing_was_run_is_told_apart(prehit: bool) -> None:
    session = three_in_flight(replace(AHEAD, sampling=RESIDUAL.sampling))
    session.is_told(says(3, TOKENS))
    _, fact, *_ = session.tell(says(7, (60,), 40.0, number=2, prehit=prehit))
    assert isinstance(fact, WindowJudged)
    assert fact.outcome is (Outcome.PREHIT_REJECTED if prehit else Outcome.PARTIAL)


def test_a_move_takes_all_windows_along_in_their_order() -> None:
    session = three_in_flight().is_told(says(3, (10, 11)), UNKNOWN)
    assert isinstance(session.state.stage, edge.Opening)
    reopened: Any = session.effects[0]
    committed = pack_tokens((10, 11))
    assert reopened.message == msgspec.structs.replace(OPEN, incarnation=2, committed=committed)
    changes: dict[str, Any] = {"handle": 2, "acknowledged": 5}
    assert session.tell(opened(2, handle=2)) == (
        sent(**changes),
        sent(SECOND, PROMPT + TOKENS, number=2, **changes),
        sent(THIRD, PROMPT + TOKENS + SECOND, number=3, **changes),
    )
