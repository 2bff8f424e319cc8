"""Many sessions on one cloud worker: the client's bookkeeping, and a small run for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.sessions import HERE, Round, _Session, measure, num_ticks
from bus.protocol.arrays import pack_tokens
from bus.protocol.errors import ConfigurationError
from bus.protocol.messages import Ack, DraftWindow, Feedback
from decoding.prefix_hash import chain, prompt_hash

ANSWER = (5, 6, 7, 8, 9, 10)


PROMPT = (1, 2)


def opened(window: int, most: int, answer: tuple[int, ...] = ANSWER) -> _Session:
    return _Session("s", PROMPT, window, most, answer, handle=9)


def feedback(start: int, *tokens: int, handle: int = 9) -> Feedback:
    return Feedback(
        handle=handle, start=start, tokens=pack_tokens(tokens), number=1, held_ms=0.0,
        verify_ms=1.0, queue_ms=0.0, pass_tokens=1,
    )  # fmt: skip


def test_windows_are_the_recorded_answer_and_feedback_grows_the_text() -> None:
    session = opened(3, 6)
    window = session.next_window()
    assert (window.handle, window.number, window.acknowledged) == (9, 1, 2)
    assert (window.start, window.token_ids) == (2, (5, 6, 7))
    assert window.follows == prompt_hash(PROMPT)
    second = session.take(feedback(2, 5, 6, 7, 8))
    assert isinstance(second, DraftWindow)
    assert (second.number, second.acknowledged, second.start) == (2, 6, 6)
    assert second.token_ids == (9, 10)
    *_, follows = chain(window.follows, (5, 6, 7, 8))
    assert second.follows == follows
    assert session.take(feedback(6, 9, 77)) is None  # a rejection after 9 ends it
    assert list(session.text) == [*ANSWER[:5], 77]
    assert session.done.is_set()


def test_feedback_that_came_twice_counts_once() -> None:
    session = opened(3, 6)
    first = feedback(2, 5, 6, 7)
    assert session.take(first) is not None
    assert session.take(first) is None
    assert session.text == (5, 6, 7)
    assert len(session.arrivals) == 1


def test_anothers_feedback_is_none() -> None:
    session = opened(3, 6)
    assert session.take(feedback(2, 5, 6, handle=8)) is None
    assert session.text == ()


def test_after_a_lost_feedback_it_asks_for_what_is_missing() -> None:
    session = opened(1, 6)
    asked = session.take(feedback(4, 7))
    assert asked == Ack(9, 2, 2, again=True)
    window = session.take(feedback(2, 5, 6, 7))
    assert isinstance(window, DraftWindow)
    assert (window.number, window.start, window.token_ids) == (3, 5, (8,))


def test_without_a_recorded_answer_it_guesses() -> None:
    session = opened(4, 2, answer=())
    assert session.next_window().token_ids == (0,)
    session.take(feedback(2, 5))
    assert session.text == (5,)


def test_ticks() -> None:
    assert num_ticks([1, 4], 3, None) == 6
    assert num_ticks([1, 4], 3, Path("x")) == 12


@pytest.mark.long
@pytest.mark.slow_model
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
