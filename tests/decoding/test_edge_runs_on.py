"""The edge of a target that goes on by itself: text beyond the drafts, gaps, acknowledgements."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from bus.protocol.arrays import pack_tokens
from bus.protocol.messages import Ack, FinishReason, Outcome
from decoding import edge
from decoding.edge import ACK_MS, CHECK_PEER_AFTER_SENDS, GIVE_UP_AFTER_SENDS
from decoding.edge_events import (
    CheckPeer,
    Commit,
    Crop,
    Draft,
    Finish,
    PeerLost,
    SeekPeer,
    Send,
    Started,
    Tick,
    WindowJudged,
)
from decoding.pacing import Acceptance
from decoding.timing import INITIAL_TIMEOUT_MS, MAX_TIMEOUT_MS
from tests.decoding.edge_session import (
    OPEN,
    PROMPT,
    READY,
    RESIDUAL,
    RUNS_ON,
    THIN,
    TOKENS,
    UNKNOWN,
    Edge,
    ack,
    drafted,
    opened,
    opening,
    running,
    says,
    sent,
    sent_rows,
    waiting,
)

OWN = (50, 51, 52)


def own_fact(num_committed: int, length: int, **changes: Any) -> WindowJudged:
    """Of text that decides no window."""
    plain = WindowJudged(
        incarnation=1, number=0, outcome=Outcome.OWN, num_drafted=0, num_accepted=0,
        num_committed=num_committed, rolled_back=False, length=length, threshold=0.0, window=4,
        credit=0.0, budget=12, in_flight=0, draft_ms=0.0, verify_ms=10.0, queue_ms=0.0,
        pass_tokens=1, rtt_ms=0.0, at_ms=20.0,
    )  # fmt: skip
    return replace(plain, **changes)


def own(start: int, tokens: tuple[int, ...], now_ms: float = 20.0, **changes: Any) -> Any:
    """Text that the target has written by itself, before any window came."""
    plain = {"number": None, "held_ms": 0.0, "queue_ms": 0.0, "pass_tokens": 1}
    return says(start, tokens, now_ms, **plain | changes)


# --- text beyond what is drafted --------------------------------------------------------------


def test_text_that_comes_while_the_draft_runs_is_committed_and_the_draft_goes_on() -> None:
    """What it is writing may be just that text: it is compared when it arrives."""
    session = running(RUNS_ON)
    assert session.tell(own(3, (10, 11))) == (
        Commit(0, (10, 11), (False, False)), own_fact(2, 5),
    )  # fmt: skip
    assert session.state.job is not None
    assert session.state.job.start == 3


def arrived(text: tuple[int, ...], tokens: tuple[int, ...] = TOKENS, spec: Any = RUNS_ON) -> Edge:
    """A draft of 10 … 13 arrives after this text."""
    return running(spec).is_told(own(3, text), drafted(1, 3, tokens, now_ms=30.0))


@pytest.mark.parametrize("overtaken", [1, 2, 3])
def test_a_draft_that_agrees_with_it_sends_the_rest(overtaken: int) -> None:
    session = arrived(TOKENS[:overtaken])
    after = PROMPT + TOKENS[:overtaken]
    assert session.effects == (
        sent(TOKENS[overtaken:], after, acknowledged=len(after)), Draft(2, (13,), 4),
    )  # fmt: skip
    assert session.state.text == PROMPT + TOKENS


def test_the_rows_sent_are_those_of_the_rest() -> None:
    session = running(replace(RESIDUAL, method=RUNS_ON.method)).is_told(own(3, (10,)))
    send, _ = session.tell(drafted(1, 3, TOKENS, now_ms=30.0))
    assert send == sent((11, 12, 13), (*PROMPT, 10), sent_rows((11, 12, 13)), acknowledged=4)


@pytest.mark.parametrize(
    ("text", "feed"),
    [(TOKENS, (13,)), ((*TOKENS, 50), (13, 50)), ((*TOKENS, 50, 51), (13, 50, 51))],
)
def test_a_draft_overtaken_wholly_sends_nothing_and_goes_on_after_the_text(
    text: tuple[int, ...], feed: tuple[int, ...]
) -> None:
    assert arrived(text).effects == (Draft(2, feed, 4),)


@pytest.mark.parametrize(
    ("text", "cached"),
    [((50,), 3), ((10, 50), 4), ((10, 11, 12, 50), 6), ((10, 50, 12, 13, 14), 4)],
)
def test_a_draft_that_the_text_contradicts_is_thrown_away(
    text: tuple[int, ...], cached: int
) -> None:
    assert arrived(text).effects == (Crop(cached), Draft(2, (PROMPT + text)[cached:], 4))


@pytest.mark.parametrize(
    ("text", "agreed", "judged"),
    [((10, 11), 2, 2), (TOKENS, 4, 4), ((10, 50), 1, 2), ((*TOKENS, 50), 4, 4), ((50,), 0, 1)],
)
def test_what_was_overtaken_counts_as_drafted_and_accepted_or_not(
    text: tuple[int, ...], agreed: int, judged: int
) -> None:
    fresh = Acceptance()
    session = arrived(text)
    acceptance = session.state.measures.acceptance
    assert acceptance == fresh.judged_as(agreed, judged > agreed)
    nothing = running(RUNS_ON).is_told(own(3, text))
    assert nothing.state.measures.acceptance == fresh  # never drafted: says nothing


def test_text_beyond_the_drafts_that_agrees_keeps_the_job_that_runs() -> None:
    session = waiting(RUNS_ON)
    job = session.state.job
    effects = session.tell(says(3, (*TOKENS, 20, 21)))
    assert effects[0] == Commit(0, (*TOKENS, 20, 21), (True,) * 4 + (False,) * 2)
    fact = effects[1]
    assert isinstance(fact, WindowJudged)
    assert (fact.outcome, fact.num_accepted, fact.num_committed) == (Outcome.ACCEPTED, 4, 6)
    assert effects[2:] == ()
    assert (session.state.job, session.state.in_flight, session.state.drafted) == (job, (), ())
    text = (*PROMPT, *TOKENS, 20, 21)
    assert session.tell(drafted(2, 7, (20, 21, 22, 23), 40.0))[0] == (
        sent((22, 23), text, number=2, acknowledged=9)
    )


def test_text_that_contradicts_a_draft_cancels_the_job_that_goes_on_from_it() -> None:
    session = waiting(RUNS_ON)
    effects = session.tell(says(3, (10, 50)))
    assert effects[0] == Commit(0, (10, 50), (True, False))
    assert effects[2:] == (Crop(4), Draft(3, (50,), 4))
    assert session.state.in_flight == ()
    before = session.state
    assert session.tell(drafted(2, 7, (20, 21))) == ()
    assert session.state == before


def test_a_part_of_a_window_leaves_it_in_flight() -> None:
    session = waiting(RUNS_ON)
    commit, fact = session.tell(says(3, (10, 11)))
    assert commit == Commit(0, (10, 11), (True, True))
    assert isinstance(fact, WindowJudged)
    assert (fact.outcome, fact.num_committed) == (Outcome.OWN, 2)
    assert (session.windows, session.state.drafted) == ([1], (12, 13))
    _, fact, *_ = session.tell(says(5, (12, 13), 40.0))
    assert isinstance(fact, WindowJudged)
    assert (fact.number, fact.num_drafted, fact.num_accepted, fact.num_committed) == (1, 4, 4, 2)


# --- gaps -------------------------------------------------------------------------------------


def test_after_a_gap_it_asks_for_what_is_missing_once_a_round_trip() -> None:
    session = running(RUNS_ON).is_told(drafted(1, 3, TOKENS), says(3, (10,), 50.0, held_ms=0.0))
    assert session.state.rtt_ms == 40.0
    before = session.state.tokens
    assert session.tell(own(6, (50,), 60.0)) == (ack(2, 4, again=True),)
    assert session.tell(own(7, (51,), 70.0)) == ()
    assert session.tell(own(8, (52,), 99.0)) == ()
    assert session.tell(own(9, (53,), 100.0)) == (ack(3, 4, again=True),)
    assert session.state.tokens == before
    session.tell(own(4, (11, 12, 50, 51, 52, 53), 110.0))
    assert session.state.tokens == (*PROMPT, 10, 11, 12, 50, 51, 52, 53)
    assert session.tell(own(12, (54,), 111.0))[-1] == ack(4, 10, again=True)


def test_a_waiting_method_asks_too() -> None:
    """Its first feedback was lost, and the target has judged a window sent since."""
    session = waiting()
    assert session.tell(says(8, (60,), 40.0)) == (ack(2, 3, again=True),)


# --- acknowledgements -------------------------------------------------------------------------


def acks(effects: tuple[Any, ...]) -> list[Ack]:
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Ack)]


@pytest.mark.parametrize(("after_ms", "due"), [(ACK_MS - 0.1, False), (ACK_MS, True)])
def test_the_lease_is_renewed_now_and_then(after_ms: float, due: bool) -> None:
    session = running(THIN)  # at 5 ms
    effects = session.tell(own(3, (50,), 5.0 + after_ms))
    assert acks(effects) == ([Ack(1, 1, 4, False)] if due else [])
    if due:
        assert session.state.last_number == 1
        assert acks(session.tell(own(4, (51,), 5.0 + after_ms + ACK_MS - 0.1))) == []
        assert acks(session.tell(own(5, (52,), 5.0 + after_ms + ACK_MS))) == [Ack(1, 2, 6, False)]


def test_a_window_renews_it_as_well() -> None:
    session = running(RUNS_ON).is_told(own(3, (10,), 20.0))
    (send, _) = session.tell(drafted(1, 3, TOKENS, now_ms=90.0))
    assert send == sent((11, 12, 13), (*PROMPT, 10), acknowledged=4)
    assert acks(session.tell(own(4, (11,), 90.0 + ACK_MS - 0.1))) == []
    assert acks(session.tell(own(5, (12,), 90.0 + ACK_MS))) == [Ack(1, 2, 6, False)]


def test_where_the_target_waits_nothing_is_acknowledged_but_by_windows() -> None:
    session = waiting()
    assert acks(session.tell(says(3, (10,), 5000.0))) == []


def test_numbers_of_windows_and_acknowledgements_are_of_one_series() -> None:
    session = waiting(RUNS_ON).is_told(says(3, (10,), 300.0))
    assert acks(session.effects) == [Ack(1, 2, 4, False)]
    session.tell(drafted(2, 7, (20, 21, 22, 23), 310.0))
    assert [message.number for message in session.messages] == [3]


# --- when nothing comes -----------------------------------------------------------------------


@pytest.mark.parametrize("spec", [RUNS_ON, THIN])
def test_a_target_that_goes_on_is_asked_what_there_is(spec: Any) -> None:
    """Whatever was lost, windows or feedback, what it has written is sent again."""
    session = running(spec)
    now_ms = 5.0
    for number in range(1, GIVE_UP_AFTER_SENDS):
        timeout_ms = min(INITIAL_TIMEOUT_MS * 2 ** (number - 1), MAX_TIMEOUT_MS)
        assert session.tell(Tick(now_ms + timeout_ms - 0.001)) == ()
        now_ms += timeout_ms
        check = (CheckPeer(),) if number >= CHECK_PEER_AFTER_SENDS else ()
        assert session.tell(Tick(now_ms)) == (ack(number, 3, again=True), *check)
    effects = session.tell(Tick(now_ms + MAX_TIMEOUT_MS))
    assert effects == (SeekPeer("the cloud worker does not answer"),)


def test_feedback_of_any_kind_makes_patience_new() -> None:
    session = running(THIN).is_told(Tick(1005.0))
    assert acks(session.effects) == [Ack(1, 1, 3, True)]
    session.is_told(own(3, (), 1500.0))
    assert isinstance(session.state.stage, edge.Running)
    assert (session.state.stage.num_asks, session.state.stage.waits_ms) == (0, 1500.0)


# --- round trips ------------------------------------------------------------------------------


def test_a_message_measures_the_round_trip_once() -> None:
    session = waiting(RUNS_ON).is_told(says(3, (10,), 40.0, held_ms=10.0))
    assert (session.state.rtt_ms, session.state.measures.round_trips) == (20.0, (20.0,))
    session.is_told(says(4, (11,), 90.0, held_ms=10.0))  # it is the last that came, still
    assert (session.state.rtt_ms, session.state.measures.round_trips) == (20.0, (20.0,))


def test_an_acknowledgement_measures_it_too() -> None:
    session = running(THIN).is_told(own(3, (50,), 200.0))
    assert acks(session.effects) == [Ack(1, 1, 4, False)]
    session.is_told(own(4, (51,), 255.0, number=1, held_ms=5.0))
    assert session.state.rtt_ms == 50.0


def test_a_later_message_that_has_come_ends_the_wait_for_earlier_ones() -> None:
    session = waiting(RUNS_ON).is_told(drafted(2, 7, (20, 21, 22, 23), 20.0))
    session.is_told(says(3, (10,), 50.0, number=2, held_ms=0.0))
    assert session.state.measures.round_trips == (30.0,)
    session.is_told(says(4, (11,), 90.0, number=1, held_ms=0.0))  # came late: says nothing
    assert session.state.measures.round_trips == (30.0,)


@pytest.mark.parametrize("number", [None, 7])
def test_feedback_that_names_none_of_ours_measures_nothing(number: int | None) -> None:
    session = waiting(RUNS_ON).is_told(says(3, (10,), 50.0, number=number))
    assert session.state.measures.round_trips == ()


# --- without a draft --------------------------------------------------------------------------


def test_a_thin_client_opens_and_takes_what_comes() -> None:
    session = Edge(THIN)
    assert opening(THIN).effects == (Send(OPEN),)
    session = opening(THIN)
    assert session.tell(READY) == ()
    assert session.tell(own(3, OWN)) == (Commit(0, OWN, (False,) * 3), own_fact(3, 6))
    assert session.state.job is None


def test_a_thin_client_ends_like_any_other() -> None:
    session = running(replace(THIN, max_new_tokens=2))
    *_, finish = session.tell(own(3, OWN))
    assert finish == Finish(FinishReason.LENGTH)
    assert session.state.tokens == (*PROMPT, 50, 51)


# --- moves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [UNKNOWN, PeerLost(30.0)])
def test_it_moves_with_the_text_that_has_come_and_the_windows_in_flight(event: Any) -> None:
    session = waiting(RUNS_ON).is_told(says(3, (10, 11)), event)
    if isinstance(session.state.stage, edge.Seeking):
        session.is_told(Started(frozenset(), 40.0))
    again = msgspec.structs.replace(OPEN, incarnation=2, committed=pack_tokens((10, 11)))
    assert session.effects[0] == Send(again)
    assert session.tell(opened(2, handle=6, now_ms=50.0)) == (sent(handle=6, acknowledged=5),)
    assert session.state.sent == ()
