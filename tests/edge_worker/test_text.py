"""Tokens to text with stop strings: what is shown, where it ends, and that cuts do not matter."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_worker.text import AnswerText
from engines.tokenizer import decode
from tests.engines.tiny import byte_fallback_tokenizer, byte_level_tokenizer

TOKENIZER: Any = byte_level_tokenizer()
TOKENIZERS = [TOKENIZER, byte_fallback_tokenizer()]


def ids(text: str) -> list[int]:
    tokens: list[int] = TOKENIZER.encode(text)
    return tokens


def test_without_stop_strings_text_is_what_the_tokens_say() -> None:
    answer = AnswerText(TOKENIZER, [])
    tokens = ids("Grüße aus Köln 😀")
    shown = "".join(answer.push([token]) for token in tokens)
    assert shown + answer.flush() == "Grüße aus Köln 😀"
    assert answer.num_tokens == len(tokens)
    assert not answer.stopped


def test_text_stops_before_the_stop_string_and_tokens_behind_the_one_that_completed_it() -> None:
    tokens = ids("the cat sat on the mat")
    answer = AnswerText(TOKENIZER, ["t s"])
    assert answer.push(tokens) == "the ca"
    assert answer.stopped
    text = decode(TOKENIZER, tokens[: answer.num_tokens])
    assert "t s" in text
    assert "t s" not in decode(TOKENIZER, tokens[: answer.num_tokens - 1])
    assert answer.flush() == ""


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not() -> None:
    answer = AnswerText(TOKENIZER, ["sat."])
    shown = answer.push(ids("the cat sat"))
    assert shown == "the cat "
    assert answer.push(ids(" on")) == "sat on"


def test_what_is_held_back_at_the_end_is_shown_then() -> None:
    answer = AnswerText(TOKENIZER, ["sat."])
    answer.push(ids("the cat sat"))
    assert answer.flush() == "sat"
    assert not answer.stopped


def test_a_character_cut_short_by_the_end_becomes_a_replacement() -> None:
    answer = AnswerText(TOKENIZER, [])
    first_byte = ids("日")[0]
    assert answer.push([*ids("a"), first_byte]) == "a"
    assert answer.flush() == "\ufffd"


def test_a_stop_string_may_be_completed_by_what_the_flush_brings() -> None:
    answer = AnswerText(TOKENIZER, ["a\ufffd"])
    answer.push([*ids("xa"), ids("日")[0]])
    assert answer.flush() == ""
    assert answer.stopped


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_windows_do_not_change_the_text(tokenizer: Any, data: st.DataObject) -> None:
    """However tokens are cut into commits: same text, same number of tokens, same stop."""
    size = len(tokenizer)
    tokens = data.draw(st.lists(st.integers(0, size - 1), max_size=25))
    whole = decode(tokenizer, tokens)
    stops = data.draw(
        st.lists(
            st.one_of(st.text("abet ", min_size=1, max_size=2), st.just(whole[3:5]).filter(bool)),
            max_size=2,
        )
        if whole[3:5]
        else st.lists(st.text("abet ", min_size=1, max_size=2), max_size=2)
    )
    one, other = AnswerText(tokenizer, stops), AnswerText(tokenizer, stops)
    text = one.push(tokens)
    at, pieces = 0, []
    while at < len(tokens) and not other.stopped:
        size = data.draw(st.integers(1, 6))
        pieces.append(other.push(tokens[at : at + size]))
        at += size
    assert "".join(pieces) == text
    assert (one.num_tokens, one.stopped) == (other.num_tokens, other.stopped)
    if one.stopped:
        assert decode(tokenizer, tokens[: one.num_tokens]).startswith(text)
    else:
        assert text + one.flush() == whole or one.stopped
    assert not any(stop in text for stop in stops)
