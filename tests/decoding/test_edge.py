"""The edge's machine as conversations: an event in, the exact list of effects out.

The sections follow the table in `decoding.edge`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bus.protocol.arrays import Float16Array, Int32Array, pack_tokens
from bus.protocol.codec import decode, encode
from bus.protocol.errors import ImpossibleEventError
from bus.protocol.messages import (
    CloseSession,
    ControlUpdate,
    DraftWindow,
    Fault,
    FaultCode,
    Feedback,
    FinishReason,
    OpenSession,
    Outcome,
    SessionReady,
)
from decoding import edge, methods
from decoding.edge import CHECK_PEER_AFTER_SENDS, GIVE_UP_AFTER_SENDS, Phase
from decoding.edge_events import (
    CheckPeer,
    Commit,
    ControlArrived,
    Crop,
    Draft,
    Drafted,
    Effect,
    Ended,
    Event,
    FaultArrived,
    FeedbackArrived,
    Finish,
    Opened,
    PeerLost,
    SeekPeer,
    Send,
    Started,
    StopMatched,
    Tick,
    WindowJudged,
)
from decoding.edge_state import CONTROL_TTL_MS
from decoding.sampling import SamplingParams
from decoding.timing import INITIAL_TIMEOUT_MS, MAX_TIMEOUT_MS, ReplyTimer

PROMPT = (1, 2, 3)
EOS = 99
SPEC = edge.SessionSpec(
    session="s1",
    client="c1",
    edge="edge-1",
    method=methods.sd.METHOD,
    prompt=PROMPT,
    sampling=SamplingParams(),
    max_new_tokens=20,
    tokenizer_digest="digest",
)
SAMPLED = replace(SPEC, sampling=SamplingParams(0.7, 0.9, 40, seed=5))
CONTROL = edge.Control(threshold=0.15, window=4, conservative_threshold=0.02)
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
    seed=0,
    max_new_tokens=20,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    tokenizer_digest="digest",
)


def rows(tokens: tuple[int, ...]) -> tuple[Int32Array, Float16Array]:
    """What a draft with K = 2 would send for these tokens."""
    ids = np.array([[token, 0] for token in tokens], dtype=np.int32)
    return ids, np.tile(np.array([0.75, 0.25], dtype=np.float16), (len(tokens), 1))


def drafted(job: int, start: int, tokens: tuple[int, ...], now_ms: float = 10.0) -> Drafted:
    ids, probs = rows(tokens) if tokens else (np.empty((0, 2), np.int32), np.empty((0, 2), "<f2"))
    num_cached = start + max(len(tokens) - 1, 0)
    return Drafted(job, start, num_cached, tokens, ids, probs, draft_ms=6.0, now_ms=now_ms)


def window(start: int, tokens: tuple[int, ...], **changes: Any) -> DraftWindow:
    ids, probs = rows(tokens)
    first = DraftWindow(
        session="s1",
        incarnation=1,
        epoch=0,
        seq=0,
        start=start,
        tokens=pack_tokens(tokens),
        q_ids=ids.tobytes(),
        q_probs=probs.tobytes(),
        threshold=0.02,
        control_version=0,
        draft_ms=6.0,
        edge_ms=0.0,
        rework_ms=0.0,
        rtt_ms=0.0,
        awaits=True,
    )
    return msgspec.structs.replace(first, **changes)


def feedback(outcome: Outcome, num_accepted: int, length: int, next_token: int | None,
             **changes: Any) -> Feedback:  # fmt: skip
    plain = Feedback(
        session="s1",
        incarnation=1,
        epoch=0,
        seq=0,
        committed_length=length,
        outcome=outcome,
        num_accepted=num_accepted,
        next_token=next_token,
        threshold=0.02,
        verify_ms=10.0,
        queue_ms=1.0,
        pass_tokens=4,
    )
    return msgspec.structs.replace(plain, **changes)


ALL_ACCEPTED = feedback(Outcome.ACCEPTED, 4, 8, 50)
TWO_ACCEPTED = feedback(Outcome.PARTIAL, 2, 6, 60)
UNKNOWN = feedback(Outcome.UNKNOWN_SESSION, 0, 0, None)
WINDOW = window(3, (10, 11, 12, 13))


class Edge:
    """A session at the edge, told events one by one."""

    def __init__(self, spec: edge.SessionSpec = SPEC, **taken_over: Any) -> None:
        self.state, self.effects = edge.begin(spec, CONTROL, **taken_over)

    def tell(self, event: Event) -> tuple[Effect, ...]:
        self.state, self.effects = edge.step(self.state, event)
        return self.effects

    def is_told(self, *events: Event) -> Edge:
        for event in events:
            self.tell(event)
        return self


READY = Opened(SessionReady("s1", 1, "cloud-1"), now_ms=5.0)
START = Started(frozenset({EOS}), now_ms=0.0)


def opening(spec: edge.SessionSpec = SPEC) -> Edge:
    return Edge(spec).is_told(START)


def running(spec: edge.SessionSpec = SPEC) -> Edge:
    """Open, while the first window is being drafted."""
    return opening(spec).is_told(READY)


def waiting(spec: edge.SessionSpec = SPEC) -> Edge:
    """The first window is in flight since t = 10 ms."""
    return running(spec).is_told(drafted(1, 3, (10, 11, 12, 13)))


def finished() -> Edge:
    return waiting().is_told(Ended(FinishReason.CANCELLED))


# --- (begin) ----------------------------------------------------------------------------------


def test_a_new_session_looks_for_a_peer() -> None:
    new = Edge()
    assert new.effects == (SeekPeer("new session"),)
    assert new.state.phase is Phase.SEEKING
    assert new.state.tokens == PROMPT
    assert (new.state.num_generated, new.state.num_remaining) == (0, 20)


def test_before_a_peer_is_found_nothing_is_sent_or_drafted() -> None:
    for event in (READY, Tick(1e9), PeerLost(1.0), FeedbackArrived(ALL_ACCEPTED, 1.0)):
        new = Edge()
        assert new.tell(event) == ()
        assert new.state.phase is Phase.SEEKING


# --- SEEKING, Started -------------------------------------------------------------------------


def test_started_opens_and_drafts_meanwhile() -> None:
    new = Edge()
    assert new.tell(START) == (Send(OPEN), Draft(job=1, feed=PROMPT, count=4))
    assert new.state.phase is Phase.OPENING


def test_sampling_parameters_travel_and_one_more_token_is_drafted() -> None:
    message = msgspec.structs.replace(OPEN, temperature=0.7, top_p=0.9, top_k=40, seed=5)
    assert Edge(SAMPLED).tell(START) == (Send(message), Draft(1, PROMPT, 5))


def test_a_session_taken_over_opens_with_what_was_promised() -> None:
    taken_over = Edge(committed=(7, 8), incarnation=1000)
    message = msgspec.structs.replace(OPEN, incarnation=1001, committed=pack_tokens((7, 8)))
    assert taken_over.tell(START) == (Send(message), Draft(1, (1, 2, 3, 7, 8), 4))


@pytest.mark.parametrize(
    ("committed", "reason"),
    [((7, EOS), FinishReason.STOP), (tuple(range(20)), FinishReason.LENGTH)],
)
def test_a_session_taken_over_at_its_end_ends(
    committed: tuple[int, ...], reason: FinishReason
) -> None:
    taken_over = Edge(committed=committed, incarnation=1000)
    assert taken_over.tell(START) == (Finish(reason),)  # no peer has heard of it


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    spec = replace(SPEC, prompt=(1, EOS))
    assert Draft(1, (1, EOS), 4) in Edge(spec).tell(START)


# --- OPENING, Drafted; OPENING, Opened --------------------------------------------------------


def test_a_window_drafted_while_opening_is_kept_and_sent_once_open() -> None:
    session = opening()
    assert session.tell(drafted(1, 3, (10, 11, 12, 13), now_ms=4.0)) == ()
    assert session.tell(READY) == (Send(WINDOW),)
    assert session.state.phase is Phase.RUNNING
    assert session.state.in_flight[0].sent_ms == 5.0


def test_opened_before_the_draft_is_done_sends_nothing_yet() -> None:
    session = opening()
    assert session.tell(READY) == ()
    assert session.state.phase is Phase.RUNNING


def test_the_answer_to_another_incarnation_opens_nothing() -> None:
    session = opening()
    for incarnation in (0, 2):
        assert session.tell(Opened(SessionReady("s1", incarnation, "cloud-1"), 5.0)) == ()
        assert session.state.phase is Phase.OPENING


def test_opened_again_sends_nothing_again() -> None:
    session = waiting()
    before = session.state
    assert session.tell(READY) == ()
    assert session.state == before


# --- OPENING, Tick ----------------------------------------------------------------------------


def test_opening_is_repeated_with_backoff_and_the_peer_looked_up_when_it_drags_on() -> None:
    session = opening()
    now_ms, waits = 0.0, []
    for number in range(1, GIVE_UP_AFTER_SENDS):
        timeout_ms = min(INITIAL_TIMEOUT_MS * 2 ** (number - 1), MAX_TIMEOUT_MS)
        assert session.tell(Tick(now_ms + timeout_ms - 0.001)) == ()
        now_ms += timeout_ms
        waits.append(timeout_ms)
        check = (CheckPeer(),) if number >= CHECK_PEER_AFTER_SENDS else ()
        assert session.tell(Tick(now_ms)) == (Send(OPEN), *check)
        assert session.tell(Tick(now_ms)) == ()
    assert waits[:4] == [1000.0, 2000.0, 4000.0, 5000.0]
    effects = session.tell(Tick(now_ms + MAX_TIMEOUT_MS))
    assert effects == (SeekPeer("the cloud worker does not answer"),)
    assert session.state.phase is Phase.SEEKING


def test_a_peer_that_never_answers_is_left_for_another_under_the_next_incarnation() -> None:
    session = opening().is_told(drafted(1, 3, (10, 11, 12, 13)))
    session.is_told(PeerLost(1.0))
    again = msgspec.structs.replace(OPEN, incarnation=2)
    assert session.tell(Started(frozenset({EOS}), 2.0)) == (Send(again),)  # drafted already


# --- RUNNING, Drafted -------------------------------------------------------------------------


def test_a_drafted_window_is_sent_and_lockstep_waits() -> None:
    session = running()
    assert session.tell(drafted(1, 3, (10, 11, 12, 13))) == (Send(WINDOW),)
    assert session.state.drafted == (10, 11, 12, 13)
    assert session.state.num_cached == 6  # the last token is drawn and not run
    assert isinstance(decode(encode(WINDOW)), DraftWindow)


def test_a_draft_that_gave_nothing_is_asked_again() -> None:
    """An interrupted draft may end before its first token; what it fed is in the cache."""
    session = running()
    assert session.tell(drafted(1, 2, ())) == (Draft(2, (3,), 4),)


def test_the_answer_to_an_older_draft_is_ignored() -> None:
    session = running()
    before = session.state
    assert session.tell(drafted(0, 3, (10, 11))) == ()
    assert session.state == before


def test_a_draft_answered_twice_counts_once() -> None:
    session = waiting()
    before = session.state
    assert session.tell(drafted(1, 3, (10, 11, 12, 13))) == ()
    assert session.state == before


@pytest.mark.parametrize(("spec", "most"), [(SPEC, 4), (SAMPLED, 5)])
@pytest.mark.parametrize("remaining", range(1, 7))
def test_no_more_is_drafted_than_may_be_committed(
    spec: edge.SessionSpec, most: int, remaining: int
) -> None:
    spec = replace(spec, max_new_tokens=remaining)
    assert Edge(spec).tell(START)[1] == Draft(1, PROMPT, min(most, remaining))


# --- RUNNING, FeedbackArrived -----------------------------------------------------------------


def judged(message: Feedback, **changes: Any) -> WindowJudged:
    facts = WindowJudged(
        feedback=message,
        num_drafted=4,
        num_committed=0,
        rolled_back=False,
        window=4,
        credit=0.0,
        budget=4,
        in_flight=4,
        draft_ms=6.0,
        rtt_ms=9.0,
        at_ms=30.0,
    )
    return replace(facts, **changes)


def test_a_full_acceptance_commits_all_and_the_bonus_token() -> None:
    session = waiting()
    assert session.tell(FeedbackArrived(ALL_ACCEPTED, now_ms=30.0)) == (
        Commit(0, (10, 11, 12, 13, 50), (True, True, True, True, False)),
        judged(ALL_ACCEPTED, num_committed=5),
        Draft(2, (13, 50), 4),  # the cache holds 6 tokens: the last drafted one was not run
    )
    assert session.state.tokens == (1, 2, 3, 10, 11, 12, 13, 50)
    assert (session.state.epoch, session.state.next_seq) == (0, 1)
    assert (session.state.in_flight, session.state.drafted) == ((), ())


def test_a_rejection_commits_the_correction_crops_and_raises_the_epoch() -> None:
    session = waiting()
    assert session.tell(FeedbackArrived(TWO_ACCEPTED, now_ms=30.0)) == (
        Commit(0, (10, 11, 60), (True, True, False)),
        judged(TWO_ACCEPTED, num_committed=3, rolled_back=True),
        Crop(5),
        Draft(2, (60,), 4),
    )
    assert session.state.tokens == (1, 2, 3, 10, 11, 60)
    assert (session.state.epoch, session.state.next_seq) == (1, 1)
    assert session.state.num_cached == 5


def test_a_rejection_of_the_last_token_crops_nothing_that_was_run() -> None:
    session = waiting()
    effects = session.tell(FeedbackArrived(feedback(Outcome.PARTIAL, 3, 7, 60), 30.0))
    assert effects[2:] == (Crop(6), Draft(2, (60,), 4))


def test_a_rejected_prehit_commits_the_targets_token_alone() -> None:
    session = waiting()
    message = feedback(Outcome.PREHIT_REJECTED, 0, 4, 60)
    assert session.tell(FeedbackArrived(message, 30.0)) == (
        Commit(0, (60,), (False,)),
        judged(message, num_committed=1, rolled_back=True),
        Crop(3),
        Draft(2, (60,), 4),
    )


def test_without_a_bonus_token_the_draft_goes_on_behind_its_own_last_token() -> None:
    session = running(SAMPLED).is_told(drafted(1, 3, (10, 11, 12, 13, 14)))
    message = feedback(Outcome.ACCEPTED, 5, 8, None)
    assert session.tell(FeedbackArrived(message, 30.0)) == (
        Commit(0, (10, 11, 12, 13, 14), (True,) * 5),
        judged(message, num_drafted=5, num_committed=5, budget=5, in_flight=5),
        Draft(2, (14,), 5),
    )


def test_the_next_window_tells_the_cost_of_the_one_before() -> None:
    session = waiting().is_told(FeedbackArrived(TWO_ACCEPTED, now_ms=30.0))
    (send,) = session.tell(drafted(2, 6, (20, 21, 22, 23), now_ms=40.0))
    assert send == Send(
        window(
            6, (20, 21, 22, 23), epoch=1, seq=1,
            edge_ms=26.0,  # first draft step at 4 ms, feedback at 30
            rework_ms=3.0,  # two of four tokens thrown away
            rtt_ms=9.0,  # 20 ms, of which 11 at the cloud
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"incarnation": 0},
        {"incarnation": 2},
        {"epoch": 1},
        {"seq": 1},
        {"outcome": Outcome.STALE},
        {"outcome": Outcome.UNKNOWN_SESSION, "incarnation": 0},
    ],
)
def test_feedback_on_anything_else_changes_nothing(changes: dict[str, Any]) -> None:
    session = waiting()
    before = session.state
    message = msgspec.structs.replace(TWO_ACCEPTED, **changes)
    assert session.tell(FeedbackArrived(message, 30.0)) == ()
    assert session.state == before


@pytest.mark.parametrize("message", [ALL_ACCEPTED, TWO_ACCEPTED])
def test_feedback_that_comes_twice_counts_once(message: Feedback) -> None:
    session = waiting().is_told(FeedbackArrived(message, 30.0))
    before = session.state
    assert session.tell(FeedbackArrived(message, 31.0)) == ()
    assert session.state == before
    session.is_told(drafted(2, len(before.tokens), (20, 21, 22, 23), now_ms=40.0))
    before = session.state
    assert session.tell(FeedbackArrived(message, 41.0)) == ()
    assert session.state == before


@pytest.mark.parametrize(
    "message",
    [
        feedback(Outcome.ACCEPTED, 4, 9, 50),  # a longer text than ours
        feedback(Outcome.ACCEPTED, 4, 7, 50),
        feedback(Outcome.ACCEPTED, 3, 7, 50),  # accepted in full, but not all of it
        feedback(Outcome.ACCEPTED, 5, 9, 50),
        feedback(Outcome.PARTIAL, 4, 8, 50),
        feedback(Outcome.PARTIAL, 2, 5, None),  # a rejection without the token in its place
        feedback(Outcome.PARTIAL, 9, 6, 60),
        feedback(Outcome.PARTIAL, 2, 2, 60),
    ],
)
def test_feedback_that_cannot_be_about_our_text_starts_over_from_ours(message: Feedback) -> None:
    session = waiting()
    effects = session.tell(FeedbackArrived(message, 30.0))
    assert effects == (Send(msgspec.structs.replace(OPEN, incarnation=2)),)
    assert session.state.tokens == PROMPT
    assert session.state.phase is Phase.OPENING


# --- … end reached ----------------------------------------------------------------------------

CLOSE = Send(CloseSession("s1", 1, "length"))


def test_the_last_token_ends_the_session() -> None:
    session = waiting(replace(SPEC, max_new_tokens=5))
    assert session.tell(FeedbackArrived(ALL_ACCEPTED, 30.0)) == (
        Commit(0, (10, 11, 12, 13, 50), (True, True, True, True, False)),
        judged(ALL_ACCEPTED, num_committed=5),
        CLOSE,
        Finish(FinishReason.LENGTH),
    )
    assert session.state.phase is Phase.FINISHED


def test_tokens_beyond_the_limit_are_not_committed() -> None:
    session = waiting(replace(SPEC, max_new_tokens=4))
    effects = session.tell(FeedbackArrived(ALL_ACCEPTED, 30.0))
    assert effects[0] == Commit(0, (10, 11, 12, 13), (True,) * 4)
    assert effects[2:] == (CLOSE, Finish(FinishReason.LENGTH))


@pytest.mark.parametrize(
    ("tokens", "message", "committed"),
    [
        ((10, EOS, 12, 13), ALL_ACCEPTED, (10, EOS)),
        ((10, 11, 12, EOS), ALL_ACCEPTED, (10, 11, 12, EOS)),
        ((10, EOS, 12, 13), TWO_ACCEPTED, (10, EOS)),
        ((10, 11, EOS, 13), feedback(Outcome.PARTIAL, 2, 6, EOS), (10, 11, EOS)),
        ((10, 11, 12, 13), feedback(Outcome.ACCEPTED, 4, 8, EOS), (10, 11, 12, 13, EOS)),
    ],
)
def test_an_end_token_ends_the_answer_behind_it(
    tokens: tuple[int, ...], message: Feedback, committed: tuple[int, ...]
) -> None:
    session = running().is_told(drafted(1, 3, tokens))
    effects = session.tell(FeedbackArrived(message, 30.0))
    assert effects[0] == Commit(
        0, committed, tuple(i < message.num_accepted for i in range(len(committed)))
    )
    assert effects[-2:] == (Send(CloseSession("s1", 1, "stop")), Finish(FinishReason.STOP))
    assert session.state.tokens == PROMPT + committed


def test_an_end_token_the_target_rejects_ends_nothing() -> None:
    session = running().is_told(drafted(1, 3, (10, 11, EOS)))
    effects = session.tell(FeedbackArrived(TWO_ACCEPTED, 30.0))
    assert effects[-1] == Draft(2, (60,), 4)


# --- … unknown session ------------------------------------------------------------------------


def test_a_cloud_that_forgot_the_session_is_told_everything_again() -> None:
    """The window in flight is not drafted again: it moves to the next incarnation."""
    session = waiting().is_told(
        FeedbackArrived(TWO_ACCEPTED, 30.0), drafted(2, 6, (20, 21, 22, 23), now_ms=40.0)
    )
    unknown = msgspec.structs.replace(UNKNOWN, epoch=1, seq=1)
    reopened = msgspec.structs.replace(
        OPEN, incarnation=2, epoch=1, next_seq=1, committed=pack_tokens((10, 11, 60))
    )
    assert session.tell(FeedbackArrived(unknown, 50.0)) == (Send(reopened),)
    assert session.state.phase is Phase.OPENING
    assert session.tell(FeedbackArrived(unknown, 51.0)) == ()
    moved = window(
        6, (20, 21, 22, 23), incarnation=2, epoch=1, seq=1, edge_ms=26.0, rework_ms=3.0, rtt_ms=9.0
    )
    assert session.tell(Opened(SessionReady("s1", 2, "cloud-1"), 60.0)) == (Send(moved),)
    (flight,) = session.state.in_flight
    assert (flight.sent_ms, flight.num_sends) == (60.0, 1)


# --- RUNNING, Tick ----------------------------------------------------------------------------


def test_an_unanswered_window_is_sent_again_with_backoff_until_the_peer_is_given_up() -> None:
    session = waiting()
    now_ms = 10.0
    for number in range(1, GIVE_UP_AFTER_SENDS):
        timeout_ms = min(INITIAL_TIMEOUT_MS * 2 ** (number - 1), MAX_TIMEOUT_MS)
        assert session.tell(Tick(now_ms + timeout_ms - 0.001)) == ()
        now_ms += timeout_ms
        check = (CheckPeer(),) if number >= CHECK_PEER_AFTER_SENDS else ()
        assert session.tell(Tick(now_ms)) == (Send(WINDOW), *check)
    effects = session.tell(Tick(now_ms + MAX_TIMEOUT_MS))
    assert effects == (SeekPeer("the cloud worker does not answer"),)


def test_with_nothing_in_flight_time_may_pass() -> None:
    assert running().tell(Tick(1e9)) == ()


def test_the_timeout_follows_measured_replies_but_not_those_to_repeated_windows() -> None:
    session = waiting().is_told(FeedbackArrived(ALL_ACCEPTED, now_ms=310.0))
    timer = ReplyTimer().sample(300.0)
    assert session.state.timer == timer
    session.is_told(drafted(2, 8, (20, 21, 22, 23), now_ms=400.0))
    assert session.tell(Tick(400.0 + timer.timeout_ms(1) - 0.001)) == ()
    assert len(session.tell(Tick(400.0 + timer.timeout_ms(1)))) == 1
    again = feedback(Outcome.ACCEPTED, 4, 13, 51, seq=1)
    session.is_told(FeedbackArrived(again, now_ms=5000.0))
    assert session.state.timer == timer.answered_late(2)  # to which send was that the reply?


# --- PeerLost ---------------------------------------------------------------------------------


@pytest.mark.parametrize("session", [opening, running, waiting])
def test_a_lost_peer_is_replaced(session: Any) -> None:
    told = session()
    assert told.tell(PeerLost(20.0)) == (SeekPeer("the cloud worker is gone"),)
    assert told.state.phase is Phase.SEEKING
    assert told.tell(PeerLost(20.0)) == ()


@pytest.mark.parametrize("message", [ALL_ACCEPTED, TWO_ACCEPTED, UNKNOWN])
def test_while_a_peer_is_sought_the_one_that_is_gone_is_not_listened_to(message: Feedback) -> None:
    session = waiting().is_told(PeerLost(20.0))
    before = session.state
    assert session.tell(FeedbackArrived(message, 25.0)) == ()
    assert session.state == before


def test_a_window_in_flight_survives_the_move_to_another_worker() -> None:
    session = waiting().is_told(PeerLost(20.0))
    reopened = msgspec.structs.replace(OPEN, incarnation=2)
    assert session.tell(Started(frozenset({EOS}), 30.0)) == (Send(reopened),)
    moved = window(3, (10, 11, 12, 13), incarnation=2)
    assert session.tell(Opened(SessionReady("s1", 2, "cloud-2"), 40.0)) == (Send(moved),)
    late = feedback(Outcome.PARTIAL, 0, 4, 77)  # of the worker before
    assert session.tell(FeedbackArrived(late, 45.0)) == ()
    verdict = feedback(Outcome.ACCEPTED, 4, 8, 50, incarnation=2)
    assert session.tell(FeedbackArrived(verdict, 61.0))[0] == Commit(
        0, (10, 11, 12, 13, 50), (True, True, True, True, False)
    )


def test_a_window_that_was_being_drafted_while_the_peer_was_lost_is_used() -> None:
    session = running().is_told(PeerLost(6.0))
    assert session.tell(drafted(1, 3, (10, 11, 12, 13))) == ()
    session.is_told(Started(frozenset({EOS}), 30.0))
    moved = window(3, (10, 11, 12, 13), incarnation=2)
    assert session.tell(Opened(SessionReady("s1", 2, "cloud-2"), 40.0)) == (Send(moved),)


# --- Ended, StopMatched -----------------------------------------------------------------------


@pytest.mark.parametrize("session", [opening, running, waiting])
@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.ERROR])
def test_whoever_ends_it_closes_it_on_the_other_side_too(
    session: Any, reason: FinishReason
) -> None:
    told = session()
    assert told.tell(Ended(reason, "why")) == (
        Send(CloseSession("s1", 1, reason.value)), Finish(reason, "why"),
    )  # fmt: skip
    assert told.state.phase is Phase.FINISHED


def test_nothing_is_closed_that_was_never_opened() -> None:
    assert Edge().tell(Ended(FinishReason.CANCELLED)) == (Finish(FinishReason.CANCELLED),)


def test_a_stop_string_cuts_the_text_behind_the_token_that_completed_it() -> None:
    session = waiting().is_told(FeedbackArrived(ALL_ACCEPTED, 30.0))
    assert session.tell(StopMatched(num_generated=2)) == (
        Send(CloseSession("s1", 1, "stop")), Finish(FinishReason.STOP),
    )  # fmt: skip
    assert session.state.tokens == (1, 2, 3, 10, 11)


@pytest.mark.parametrize(
    "event",
    [
        START,
        READY,
        drafted(1, 3, (10, 11)),
        FeedbackArrived(ALL_ACCEPTED, 30.0),
        FeedbackArrived(UNKNOWN, 30.0),
        ControlArrived(ControlUpdate("s1", 1, 1, 0.1, 4, 0.0, 0.0), 30.0),
        FaultArrived(Fault("s1", FaultCode.OVERLOADED, ""), 30.0),
        Tick(1e9),
        PeerLost(30.0),
        StopMatched(1),
        Ended(FinishReason.ERROR),
    ],
    ids=lambda event: type(event).__name__,
)
def test_after_the_end_nothing_happens(event: Event) -> None:
    session = finished()
    before = session.state
    assert session.tell(event) == ()
    assert session.state == before


# --- FaultArrived -----------------------------------------------------------------------------


def fault(code: FaultCode) -> FaultArrived:
    return FaultArrived(Fault("s1", code, "why"), 30.0)


def test_out_of_order_starts_over_from_our_text() -> None:
    effects = waiting().tell(fault(FaultCode.OUT_OF_ORDER))
    assert effects == (Send(msgspec.structs.replace(OPEN, incarnation=2)),)


@pytest.mark.parametrize("session", [opening, running, waiting])
@pytest.mark.parametrize(
    "code", [FaultCode.OVERLOADED, *sorted(edge.CURABLE - {FaultCode.OUT_OF_ORDER})]
)
def test_a_worker_that_is_full_or_fails_is_left_for_another(session: Any, code: FaultCode) -> None:
    told = session()
    assert told.tell(fault(code)) == (SeekPeer(f"{code.value}: why", 100.0),)
    assert told.tell(fault(code)) == ()


def opens(session: Edge) -> list[OpenSession]:
    """What goes out once a worker is found."""
    return [
        effect.message
        for effect in session.tell(START)
        if isinstance(effect, Send) and isinstance(effect.message, OpenSession)
    ]


@pytest.mark.parametrize(
    "refusal",
    [
        fault(FaultCode.OVERLOADED),
        fault(FaultCode.OUT_OF_ORDER),
        FeedbackArrived(UNKNOWN, 30.0),
        FeedbackArrived(msgspec.structs.replace(ALL_ACCEPTED, committed_length=99), 30.0),
    ],
    ids=["overloaded", "out_of_order", "unknown_session", "misfit"],
)
def test_each_refusal_without_a_verdict_between_makes_the_pause_longer(refusal: Event) -> None:
    """The first misunderstanding is put right at once; from then on a worker is not hammered."""
    session, pauses = waiting(), []
    for _ in range(9):
        state = session.state
        if isinstance(refusal, FeedbackArrived):
            message = msgspec.structs.replace(refusal.message, incarnation=state.incarnation)
            refusal = FeedbackArrived(message, 30.0)
        pauses += [e.pause_ms for e in session.tell(refusal) if isinstance(e, SeekPeer)]
        if session.state.phase is Phase.FINISHED:
            break
        if session.state.phase is Phase.SEEKING:
            session.tell(START)
        session.tell(Opened(SessionReady("s1", session.state.incarnation, "cloud-1"), 30.0))
    assert pauses == sorted(pauses)
    assert all(p == min(2 * q, 2000.0) for q, p in pairwise(pauses))
    assert pauses[0] == (100.0 if refusal == fault(FaultCode.OVERLOADED) else 200.0)


def test_a_verdict_makes_the_next_pause_short_again() -> None:
    session = waiting()
    for _ in range(2):
        session.tell(fault(FaultCode.OVERLOADED))
        session.tell(START)
    session.tell(Opened(SessionReady("s1", session.state.incarnation, "cloud-1"), 30.0))
    verdict = msgspec.structs.replace(ALL_ACCEPTED, incarnation=session.state.incarnation)
    session.tell(FeedbackArrived(verdict, 40.0))
    assert session.tell(fault(FaultCode.OVERLOADED)) == (SeekPeer("overloaded: why", 100.0),)


def test_an_incarnation_refused_before_any_window_is_used_again() -> None:
    """Waiting for a place uses none up: the bound of one owner is for real reopenings."""
    session = opening()
    first = session.state.incarnation
    for _ in range(50):
        session.tell(fault(FaultCode.OVERLOADED))
        assert [message.incarnation for message in opens(session)] == [first]
    session.tell(Opened(SessionReady("s1", first, "cloud-1"), 30.0))
    session.tell(fault(FaultCode.OVERLOADED))  # the worker leaves
    assert [message.incarnation for message in opens(session)] == [first + 1]


def test_no_incarnation_of_a_successor_is_ever_used() -> None:
    spec = replace(SPEC, max_new_tokens=50)
    session = Edge(spec, incarnation=8, last_incarnation=10)
    assert [m.incarnation for m in opens(session)] == [9]
    session.tell(PeerLost(1.0))
    assert [m.incarnation for m in opens(session)] == [10]
    session.tell(PeerLost(1.0))
    *_, last = session.tell(START)
    assert isinstance(last, Finish)
    assert last.reason is FinishReason.ERROR
    assert "no cloud worker kept the session" in last.error


@pytest.mark.parametrize("code", sorted(edge.CURABLE))
def test_a_prompt_that_fails_everywhere_ends_with_the_reason(code: FaultCode) -> None:
    session = waiting()
    for _ in range(edge.GIVE_UP_AFTER_FAILURES - 1):
        session.tell(fault(code))
        assert session.state.phase is not Phase.FINISHED
        if session.state.phase is Phase.SEEKING:
            session.tell(START)
        session.tell(Opened(SessionReady("s1", session.state.incarnation, "cloud-1"), 30.0))
    *_, last = session.tell(fault(code))
    assert last == Finish(FinishReason.ERROR, f"{code.value}: why")


@pytest.mark.parametrize(
    ("session", "event"),
    [
        (running, START),
        (running, drafted(99, 3, (10, 11))),
        (waiting, StopMatched(99)),
    ],
)
def test_what_cannot_happen_is_an_error_and_changes_nothing(session: Any, event: Event) -> None:
    told = session()
    before = told.state
    with pytest.raises(ImpossibleEventError):
        told.tell(event)
    assert told.state == before


@pytest.mark.parametrize(
    "code", sorted(set(FaultCode) - edge.CURABLE - {FaultCode.OVERLOADED}), ids=str
)
def test_what_cannot_be_helped_ends_the_session_and_says_why(code: FaultCode) -> None:
    assert waiting().tell(fault(code)) == (
        Send(CloseSession("s1", 1, "error")), Finish(FinishReason.ERROR, f"{code.value}: why"),
    )  # fmt: skip


# --- ControlArrived ---------------------------------------------------------------------------


def update(term: int, version: int, threshold: float, window: int = 4) -> ControlUpdate:
    return ControlUpdate("s1", term, version, threshold, window, 0.5, 0.0)


def sent_window(session: Edge, now_ms: float) -> DraftWindow:
    (send,) = session.tell(drafted(1, 3, (10, 11, 12, 13), now_ms))
    assert isinstance(send, Send)
    assert isinstance(send.message, DraftWindow)
    return send.message


def test_an_update_sets_threshold_window_and_version_from_the_next_window_on() -> None:
    session = running()
    assert session.tell(ControlArrived(update(1, 7, 0.1, window=6), 6.0)) == ()
    sent = sent_window(session, now_ms=10.0)
    assert (sent.threshold, sent.control_version) == (0.1, 7)
    effects = session.tell(FeedbackArrived(ALL_ACCEPTED, 30.0))
    assert effects[1:] == (
        judged(ALL_ACCEPTED, num_committed=5, window=6, credit=0.5, budget=6),
        Draft(2, (13, 50), 6),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("term", "version", "taken"),
    [(2, 5, True), (2, 6, True), (3, 1, True), (2, 4, False), (1, 99, False)],
)
def test_older_updates_are_ignored(term: int, version: int, taken: bool) -> None:
    session = running().is_told(ControlArrived(update(2, 5, 0.1), 6.0))
    session.tell(ControlArrived(update(term, version, 0.12), 7.0))
    assert session.state.control.threshold == (0.12 if taken else 0.1)
    assert session.state.control.heard_ms == (7.0 if taken else 6.0)


def test_without_a_controller_the_conservative_threshold_holds() -> None:
    assert sent_window(running(), now_ms=10.0).threshold == 0.02


@pytest.mark.parametrize(
    ("silent_ms", "expected"), [(CONTROL_TTL_MS, 0.1), (CONTROL_TTL_MS + 0.001, 0.02)]
)
def test_when_the_controller_falls_silent_the_conservative_threshold_returns(
    silent_ms: float, expected: float
) -> None:
    session = running().is_told(ControlArrived(update(1, 1, 0.1), 6.0))
    assert sent_window(session, 6.0 + silent_ms).threshold == expected


def test_a_repeated_update_proves_the_controller_alive() -> None:
    session = running().is_told(ControlArrived(update(1, 1, 0.1), 6.0))
    session.tell(ControlArrived(update(1, 1, 0.1), 6000.0))
    assert sent_window(session, 10_000.0).threshold == 0.1


def test_a_threshold_below_the_conservative_one_stays_when_the_controller_is_gone() -> None:
    session = running().is_told(ControlArrived(update(1, 1, 0.005), 6.0))
    assert sent_window(session, 1e6).threshold == 0.005


# --- anything, in any order -------------------------------------------------------------------

small = st.integers(0, 3)
any_feedback = st.builds(
    feedback, st.sampled_from(Outcome), st.integers(0, 6), st.integers(0, 12),
    st.none() | st.sampled_from([50, EOS]), incarnation=small, epoch=small, seq=small,
)  # fmt: skip
any_event: st.SearchStrategy[Any] = st.one_of(
    st.just(START),
    st.builds(lambda i: Opened(SessionReady("s1", i, "cloud"), 0.0), small),
    st.builds(lambda m: FeedbackArrived(m, 0.0), any_feedback),
    st.builds(fault, st.sampled_from([*sorted(edge.CURABLE), FaultCode.OVERLOADED])),
    st.builds(lambda t, v, w: ControlArrived(update(t, v, 0.1, w), 0.0), small, small,
              st.integers(1, 5)),
    st.just(Tick(1e9)),
    st.just(PeerLost(0.0)),
    st.just("drafted"),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(any_event, max_size=30), st.sampled_from([SPEC, SAMPLED]))
def test_no_order_of_events_breaks_the_text(events: list[Any], spec: edge.SessionSpec) -> None:
    """Commits append, messages are valid, and what is drafted is what is in flight."""
    session = Edge(replace(spec, max_new_tokens=8))
    answer: tuple[int, ...] = ()
    jobs: list[Draft] = []
    for happening in events:
        event = happening
        if happening == "drafted":
            if not jobs:
                continue
            job = jobs.pop()
            start = session.state.num_cached + len(job.feed)
            event = drafted(job.job, start, tuple(range(20, 20 + job.count)))
        if event is START and session.state.phase not in (Phase.SEEKING, Phase.FINISHED):
            continue
        for effect in session.tell(event):
            match effect:
                case Commit(start, tokens, accepted):
                    assert start == len(answer)
                    assert len(tokens) == len(accepted) > 0
                    answer += tokens
                case Draft():
                    assert effect.feed
                    assert effect.count > 0
                    jobs.append(effect)
                case Send(message):
                    decode(encode(message))
                case _:
                    pass
        state = session.state
        assert state.tokens == PROMPT + answer
        if state.phase is not Phase.FINISHED:
            in_flight = tuple(t for f in state.in_flight for t in f.message.token_ids)
            assert in_flight == state.drafted
            assert len(answer) < 8
