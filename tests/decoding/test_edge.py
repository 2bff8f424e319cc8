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
from bus.protocol.messages import CloseSession, DraftWindow, FinishReason, Outcome
from decoding import edge
from decoding.edge import CHECK_PEER_AFTER_SENDS, GIVE_UP_AFTER_SENDS
from decoding.edge_events import (
    CheckPeer,
    Commit,
    Crop,
    Draft,
    Event,
    Finish,
    PeerLost,
    SeekPeer,
    Send,
    Started,
    Tick,
)
from decoding.timing import MAX_TIMEOUT_MS, OPENING_TIMEOUT_MS
from tests.decoding.edge_session import (
    ALL_ACCEPTED,
    EOS,
    OPEN,
    PROMPT,
    READY,
    RESIDUAL,
    SPEC,
    START,
    TOKENS,
    TWO_ACCEPTED,
    UNKNOWN,
    Edge,
    drafted,
    judged,
    opened,
    opening,
    running,
    says,
    sent,
    sent_rows,
    waiting,
)

# --- (begin) ----------------------------------------------------------------------------------


def test_a_new_session_looks_for_a_peer() -> None:
    new = Edge()
    assert new.effects == (SeekPeer("new session"),)
    assert new.state.stage == edge.Seeking()
    assert new.state.tokens == PROMPT
    assert (new.state.num_generated, new.state.num_remaining) == (0, 20)


@pytest.mark.parametrize("event", [READY, Tick(1e9), PeerLost(1.0), ALL_ACCEPTED, UNKNOWN])
def test_before_a_peer_is_found_nothing_is_sent_or_drafted(event: Event) -> None:
    new = Edge()
    assert new.tell(event) == ()
    assert new.state.stage == edge.Seeking()


# --- SEEKING, Started -------------------------------------------------------------------------


def test_started_opens_and_drafts_meanwhile() -> None:
    new = Edge()
    assert new.tell(START) == (Send(OPEN), Draft(job=1, feed=PROMPT, count=4))
    assert new.state.stage == edge.Opening(1, 0.0)


def test_sampling_parameters_travel() -> None:
    message = msgspec.structs.replace(
        OPEN, temperature=0.7, top_p=0.9, top_k=40, seed=5, coupling=RESIDUAL.sampling.coupling
    )
    assert Edge(RESIDUAL).tell(START) == (Send(message), Draft(1, PROMPT, 4))


def test_a_session_taken_over_opens_with_what_was_promised() -> None:
    taken_over = Edge(committed=(7, 8), incarnation=1000)
    message = msgspec.structs.replace(OPEN, incarnation=1001, committed=pack_tokens((7, 8)))
    assert taken_over.tell(START) == (Send(message), Draft(1, (1, 2, 3, 7, 8), 4))
    taken_over.is_told(opened(1001))
    after = (*PROMPT, 7, 8)
    assert taken_over.tell(drafted(1, 5, TOKENS)) == (sent(TOKENS, after, acknowledged=5),)


@pytest.mark.parametrize(
    ("committed", "reason"),
    [((7, EOS), FinishReason.STOP), (tuple(range(20)), FinishReason.LENGTH)],
)
def test_a_session_taken_over_at_its_end_ends(
    committed: tuple[int, ...], reason: FinishReason
) -> None:
    taken_over = Edge(committed=committed, incarnation=1000)
    _, finish = taken_over.tell(START)
    assert finish == Finish(reason)


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    spec = replace(SPEC, prompt=(1, EOS))
    assert Draft(1, (1, EOS), 4) in Edge(spec).tell(START)


# --- OPENING, Drafted; OPENING, Opened --------------------------------------------------------


def test_a_window_drafted_while_opening_is_kept_and_sent_once_open() -> None:
    session = opening()
    assert session.tell(drafted(1, 3, TOKENS, now_ms=4.0)) == ()
    assert session.tell(READY) == (sent(),)
    assert session.state.stage == edge.Running(handle=1, waits_ms=5.0, acked_ms=5.0)
    assert session.state.in_flight[0].num_sends == 1


def test_opened_before_the_draft_is_done_sends_nothing_yet() -> None:
    session = opening()
    assert session.tell(READY) == ()
    assert isinstance(session.state.stage, edge.Running)


@pytest.mark.parametrize("incarnation", [0, 2])
def test_the_answer_to_another_incarnation_opens_nothing(incarnation: int) -> None:
    session = opening()
    assert session.tell(opened(incarnation)) == ()
    assert isinstance(session.state.stage, edge.Opening)


@pytest.mark.parametrize("event", [READY, opened(1, handle=9)])
def test_opened_again_sends_nothing_again(event: Event) -> None:
    session = waiting()
    before = session.state
    assert session.tell(event) == ()
    assert session.state == before


def test_windows_carry_the_handle_of_their_session() -> None:
    session = opening().is_told(opened(1, handle=2**31 - 1))
    assert session.tell(drafted(1, 3, TOKENS)) == (sent(handle=2**31 - 1),)


# --- OPENING, Tick ----------------------------------------------------------------------------


def test_opening_is_repeated_with_backoff_and_the_peer_looked_up_when_it_drags_on() -> None:
    session = opening()
    now_ms, waits = 0.0, []
    for number in range(1, GIVE_UP_AFTER_SENDS):
        timeout_ms = min(OPENING_TIMEOUT_MS * 2 ** (number - 1), MAX_TIMEOUT_MS)
        assert session.tell(Tick(now_ms + timeout_ms - 0.001)) == ()
        now_ms += timeout_ms
        waits.append(timeout_ms)
        check = (CheckPeer(),) if number >= CHECK_PEER_AFTER_SENDS else ()
        assert session.tell(Tick(now_ms)) == (Send(OPEN), *check)
        assert session.tell(Tick(now_ms)) == ()
    assert waits[:4] == [100.0, 200.0, 400.0, 800.0]
    effects = session.tell(Tick(now_ms + MAX_TIMEOUT_MS))
    assert effects == (SeekPeer("the cloud worker does not answer"),)
    assert session.state.stage == edge.Seeking()


def test_a_peer_that_never_answers_is_left_for_another_under_the_next_incarnation() -> None:
    session = opening().is_told(drafted(1, 3, TOKENS))
    session.is_told(PeerLost(1.0))
    again = msgspec.structs.replace(OPEN, incarnation=2)
    assert session.tell(Started(frozenset({EOS}), 2.0)) == (Send(again),)  # drafted already


# --- RUNNING, Drafted -------------------------------------------------------------------------


def test_a_drafted_window_is_sent_and_lockstep_waits() -> None:
    session = running()
    assert session.tell(drafted(1, 3, TOKENS)) == (sent(),)
    assert session.state.drafted == TOKENS
    assert session.state.num_cached == 6  # the last token is drawn and not run
    assert isinstance(decode(encode(sent().message)), DraftWindow)


def test_probabilities_travel_where_the_coupling_needs_them() -> None:
    session = running(RESIDUAL)
    assert session.tell(drafted(1, 3, TOKENS)) == (sent(rows=sent_rows(TOKENS)),)


def test_a_draft_that_gave_nothing_is_asked_again() -> None:
    """An interrupted draft may end before its first token; what it fed is in the cache."""
    session = running()
    assert session.tell(drafted(1, 2, ())) == (Draft(2, (3,), 4),)


@pytest.mark.parametrize("session", [running, waiting])
def test_the_answer_to_an_older_draft_or_a_second_one_is_ignored(session: Any) -> None:
    told = session()
    before = told.state
    for job in range(1 if session is running else 2):
        assert told.tell(drafted(job, 3, TOKENS)) == ()
        assert told.state == before


@pytest.mark.parametrize("remaining", range(1, 7))
def test_no_more_is_drafted_than_may_be_committed(remaining: int) -> None:
    spec = replace(SPEC, max_new_tokens=remaining)
    assert Edge(spec).tell(START)[1] == Draft(1, PROMPT, min(4, remaining))


# --- RUNNING, FeedbackArrived -----------------------------------------------------------------


def test_a_full_acceptance_commits_all_and_the_bonus_token() -> None:
    session = waiting()
    assert session.tell(ALL_ACCEPTED) == (
        Commit(0, (10, 11, 12, 13, 50), (True, True, True, True, False)),
        judged(Outcome.ACCEPTED, 4, 5),
        Draft(2, (13, 50), 4),  # the cache holds 6 tokens: the last drafted one was not run
    )
    assert session.state.tokens == (1, 2, 3, 10, 11, 12, 13, 50)
    assert (session.state.in_flight, session.state.drafted) == ((), ())


def test_a_rejection_commits_the_correction_and_crops() -> None:
    session = waiting()
    assert session.tell(TWO_ACCEPTED) == (
        Commit(0, (10, 11, 60), (True, True, False)),
        judged(Outcome.PARTIAL, 2, 3),
        Crop(5),
        Draft(2, (60,), 4),
    )
    assert session.state.tokens == (1, 2, 3, 10, 11, 60)
    assert session.state.num_cached == 5


def test_a_rejection_of_the_last_token_crops_nothing_that_was_run() -> None:
    effects = waiting().tell(says(3, (10, 11, 12, 60)))
    assert effects[2:] == (Crop(6), Draft(2, (60,), 4))


def test_a_rejected_prehit_commits_the_targets_token_alone() -> None:
    assert waiting().tell(says(3, (60,), prehit=True)) == (
        Commit(0, (60,), (False,)),
        judged(Outcome.PREHIT_REJECTED, 0, 1),
        Crop(3),
        Draft(2, (60,), 4),
    )


def test_without_a_bonus_token_the_draft_goes_on_after_its_own_last_token() -> None:
    assert waiting(RESIDUAL).tell(says(3, TOKENS)) == (
        Commit(0, TOKENS, (True,) * 4),
        judged(Outcome.ACCEPTED, 4, 4),
        Draft(2, (13,), 4),
    )


def test_the_next_window_follows_the_text_and_tells_the_cost_of_the_one_before() -> None:
    session = waiting(RESIDUAL).is_told(TWO_ACCEPTED)
    tokens = (20, 21, 22, 23)
    made = sent_rows(
        tokens,
        edge_ms=26.0,  # first draft step at 4 ms, feedback at 30
        rework_ms=3.0,  # two of four tokens thrown away
    )
    assert session.tell(drafted(2, 6, tokens, now_ms=40.0)) == (
        sent(tokens, (*PROMPT, 10, 11, 60), made, number=2, acknowledged=6),
    )


@pytest.mark.parametrize("changes", [{"handle": 0}, {"handle": 2}])
def test_feedback_to_another_session_changes_nothing(changes: dict[str, Any]) -> None:
    session = waiting()
    before = session.state
    assert session.tell(says(3, (10, 11, 60), **changes)) == ()
    assert session.state == before


@pytest.mark.parametrize("event", [ALL_ACCEPTED, TWO_ACCEPTED])
def test_feedback_that_comes_twice_commits_once(event: Any) -> None:
    session = waiting().is_told(event)
    text = session.state.tokens
    again = replace(event, now_ms=31.0)
    assert session.tell(again) == ()
    session.is_told(drafted(2, len(text), (20, 21, 22, 23), now_ms=40.0))
    assert session.tell(again) == ()
    assert session.state.tokens == text
    assert session.state.drafted == (20, 21, 22, 23)


@pytest.mark.parametrize(
    ("start", "tokens", "new"),
    [(3, (10, 11, 60, 61), (61,)), (5, (60, 61, 62), (61, 62)), (6, (61,), (61,)), (4, (11,), ())],
)
def test_feedback_may_overlap_what_has_come_before(
    start: int, tokens: tuple[int, ...], new: tuple[int, ...]
) -> None:
    session = waiting().is_told(TWO_ACCEPTED)
    commits = [e.tokens for e in session.tell(says(start, tokens, 40.0)) if isinstance(e, Commit)]
    assert commits == ([new] if new else [])
    assert session.state.tokens == (*PROMPT, 10, 11, 60, *new)


@pytest.mark.parametrize(
    ("start", "tokens"), [(3, (10, 12)), (5, (61,)), (0, (1, 2, 4)), (3, (10, 11, 61, 62))]
)
def test_text_that_is_not_ours_starts_over_from_ours(start: int, tokens: tuple[int, ...]) -> None:
    session = waiting().is_told(TWO_ACCEPTED)
    effects = session.tell(says(start, tokens, 40.0))
    again = msgspec.structs.replace(OPEN, incarnation=2, committed=pack_tokens((10, 11, 60)))
    assert effects[0] == Send(again)
    assert session.state.tokens == (*PROMPT, 10, 11, 60)
    assert isinstance(session.state.stage, edge.Opening)


# --- … end reached ----------------------------------------------------------------------------

CLOSE = Send(CloseSession("s1", 1, "length"))


def test_the_last_token_ends_the_session() -> None:
    session = waiting(replace(SPEC, max_new_tokens=5))
    assert session.tell(ALL_ACCEPTED) == (
        Commit(0, (10, 11, 12, 13, 50), (True, True, True, True, False)),
        judged(Outcome.ACCEPTED, 4, 5),
        CLOSE,
        Finish(FinishReason.LENGTH),
    )
    assert session.state.stage == edge.Finished()


def test_tokens_beyond_the_limit_are_not_committed() -> None:
    effects = waiting(replace(SPEC, max_new_tokens=4)).tell(ALL_ACCEPTED)
    assert effects[0] == Commit(0, TOKENS, (True,) * 4)
    assert effects[2:] == (CLOSE, Finish(FinishReason.LENGTH))


@pytest.mark.parametrize(
    ("tokens", "text", "num_accepted", "committed"),
    [
        ((10, EOS, 12, 13), (10, EOS, 12, 13, 50), 2, (10, EOS)),
        ((10, 11, 12, EOS), (10, 11, 12, EOS), 4, (10, 11, 12, EOS)),
        ((10, 11, EOS, 13), (10, 11, EOS), 3, (10, 11, EOS)),
        ((10, 11, 12, 13), (10, 11, EOS), 2, (10, 11, EOS)),
        ((10, 11, 12, 13), (10, 11, 12, 13, EOS), 4, (10, 11, 12, 13, EOS)),
    ],
)
def test_an_end_token_ends_the_answer_after_it(
    tokens: tuple[int, ...], text: tuple[int, ...], num_accepted: int, committed: tuple[int, ...]
) -> None:
    session = running().is_told(drafted(1, 3, tokens))
    effects = session.tell(says(3, text))
    assert effects[0] == Commit(
        0, committed, tuple(i < num_accepted for i in range(len(committed)))
    )
    assert effects[-2:] == (Send(CloseSession("s1", 1, "stop")), Finish(FinishReason.STOP))
    assert session.state.tokens == PROMPT + committed


def test_an_end_token_the_target_rejects_ends_nothing() -> None:
    session = running().is_told(drafted(1, 3, (10, 11, EOS)))
    assert session.tell(TWO_ACCEPTED)[-1] == Draft(2, (60,), 4)
