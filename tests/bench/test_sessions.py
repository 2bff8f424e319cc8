"""Many sessions on one cloud worker: the client's bookkeeping, and a small run for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.sessions import HERE, Round, _Session, measure, num_ticks
from bus.protocol.errors import ConfigurationError
from bus.protocol.messages import Feedback, Outcome

ANSWER = (5, 6, 7, 8, 9, 10)


def feedback(session: _Session, accepted: int, following: int | None) -> Feedback:
    return Feedback(
        session=session.name, incarnation=1, epoch=session.epoch, seq=session.seq,
        committed_length=0, outcome=Outcome.ACCEPTED, num_accepted=accepted, next_token=following,
        threshold=0.0, verify_ms=1.0, queue_ms=0.0, pass_tokens=1,
    )  # fmt: skip


def test_windows_are_the_recorded_answer_and_feedback_grows_the_text() -> None:
    session = _Session("s", (1, 2), 3, 6, ANSWER)
    window = session.next_window()
    assert (window.start, window.token_ids, window.awaits) == (2, (5, 6, 7), False)
    session.take(feedback(session, 3, 8))
    assert list(session.text) == [5, 6, 7, 8]
    assert session.seq == 1
    assert session.epoch == 0
    session.take(feedback(session, 1, 77))  # a rejection after 9
    assert list(session.text) == [*ANSWER[:5], 77]
    assert session.seq == 2
    assert session.epoch == 1
    assert session.done.is_set()


def test_feedback_that_came_twice_counts_once() -> None:
    session = _Session("s", (1, 2), 3, 6, ANSWER)
    first = feedback(session, 2, 7)
    session.take(first)
    session.take(first)
    assert session.text == (5, 6, 7)


def test_without_a_recorded_answer_it_guesses() -> None:
    session = _Session("s", (1, 2), 4, 2)
    assert session.next_window().token_ids == (0,)
    session.take(feedback(session, 0, 5))
    assert session.text == (5,)


def test_ticks() -> None:
    assert num_ticks([1, 4], 3, None) == 6
    assert num_ticks([1, 4], 3, Path("x")) == 12


@pytest.mark.long
@pytest.mark.slow_model
@pytest.mark.timeout(300)
def test_every_answer_is_the_one_it_gives_alone() -> None:
    ticks: list[None] = []
    (ran,) = measure(3, [2], 12, 1, "int8", None, lambda: ticks.append(None))
    assert isinstance(ran, Round)
    assert (ran.version, ran.window, ran.identical, len(ticks)) == (HERE, 2, 3, 1)
    assert ran.tokens_per_s > 0
    assert ran.gap_ms > 0


def test_another_folder_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no checkout of this project"):
        measure(2, [1], 8, 1, "int8", tmp_path, lambda: None)
