"""Judges of steps."""

from __future__ import annotations

import pytest

from decoding.judges import SameText, Similar

STEP = "First, the farmer has 12 apples and gives 5 of them to his neighbour, so he keeps 7.\n\n"


@pytest.mark.parametrize("judge", [SameText(), Similar()])
@pytest.mark.parametrize("other", [STEP, STEP.strip(), STEP.upper(), STEP.replace(" ", "\n ")])
def test_white_space_and_capitals_do_not_count(judge: SameText | Similar, other: str) -> None:
    assert judge(STEP, other)
    assert judge(other, STEP)


def test_another_word_is_another_text_and_still_similar() -> None:
    other = STEP.replace("neighbour", "neighbor")
    assert not SameText()(STEP, other)
    assert Similar()(STEP, other)
    assert not Similar(least=0.999)(STEP, other)


def test_what_is_less_alike_than_the_bound_is_not_similar() -> None:
    """Similarity is 1 − d ÷ (m + n), d counting insertions and deletions."""
    assert Similar(least=0.9)("abcdefghij", "abcdefghix")  # d = 2 of 20
    assert not Similar(least=0.95)("abcdefghij", "abcdefghix")
    assert not Similar()(STEP, "It rains.")


@pytest.mark.parametrize("other", [STEP.replace("7", "8"), STEP.replace("5", "15"), STEP + "3"])
def test_steps_with_other_numbers_are_never_similar(other: str) -> None:
    assert not Similar()(STEP, other)
    assert not SameText()(STEP, other)


def test_empty_texts_are_alike() -> None:
    assert SameText()("\n\n", "")
    assert Similar()("\n\n", "")


def test_judges_say_by_what_they_judge() -> None:
    assert SameText().name == "exact match"
    assert Similar().name == "similarity of at least 0.95"
