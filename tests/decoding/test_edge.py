"""The edge's machine as conversations: an event in, the exact list of effects out.

The sections follow the table in `decoding.edge`.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from bus.protocol.arrays import pack_tokens
from bus.protocol.codec import decode, encode
from bus.protocol.messages import (
    CloseSession,
    DraftWindow,
    Feedback,
    FinishReason,
    Outcome,
    SessionReady,
)
from decoding import edge
from decoding.edge import CHECK_PEER_AFTER_SENDS, GIVE_UP_AFTER_SENDS, Phase
from decoding.edge_events import (
    CheckPeer,
    Commit,
    Crop,
    Draft,
    FeedbackArrived,
    Finish,
    Opened,
    PeerLost,
    SeekPeer,
    Send,
    Started,
    Tick,
)
from decoding.timing import INITIAL_TIMEOUT_MS, MAX_TIMEOUT_MS
from tests.decoding.edge_session import (
    ALL_ACCEPTED,
    EOS,
    OPEN,
    PROMPT,
    READY,
    SAMPLED,
    SPEC,
    START,
    TWO_ACCEPTED,
    WINDOW,
    Edge,
    drafted,
    feedback,
    judged,
    opening,
    running,
    waiting,
    window,
)

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
