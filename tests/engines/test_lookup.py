"""Lookup drafting against its definition, by brute force."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engines import lookup
from engines.lookup import SuffixIndex

texts = st.lists(st.integers(0, 2), max_size=40)


def index(text: list[int], min_match: int = 2, always: bool = False) -> SuffixIndex:
    suffixes = SuffixIndex(min_match, always)
    suffixes.extend(text)
    return suffixes


def looked_up(text: list[int], min_match: int) -> int | None:
    """The definition: all earlier places, the longest agreement with the end, the latest of
    equals, among the latest candidates."""
    matches = []
    for end in range(len(text) - 1):
        size = 0
        while size <= end and text[end - size] == text[len(text) - 1 - size]:
            size += 1
        if size >= min_match:
            matches.append((min(size, lookup.MAX_COMPARED), end))
    matches = matches[-lookup.MAX_CANDIDATES :]
    return text[max(matches)[1] + 1] if matches else None


@given(text=texts, min_match=st.integers(1, 4))
def test_it_proposes_what_followed_the_longest_earlier_match(
    text: list[int], min_match: int
) -> None:
    assert index(text, min_match).propose() == looked_up(text, min_match)


@given(steps=st.lists(st.tuples(texts, st.integers(0, 40)), max_size=6), always=st.booleans())
def test_a_proposal_is_a_function_of_the_text_whatever_was_written_and_taken_back(
    steps: list[tuple[list[int], int]], always: bool
) -> None:
    suffixes, text = SuffixIndex(2, always), list[int]()
    for more, length in steps:
        suffixes.extend(more)
        suffixes.truncate(length)
        text = (text + more)[:length]
        assert len(suffixes) == len(text)
        assert suffixes.propose() == index(text, always=always).propose()


@given(texts.filter(bool))
def test_without_a_model_there_is_always_a_proposal(text: list[int]) -> None:
    long, short = looked_up(text, 3), looked_up(text, 1)
    expected = long if long is not None else short if short is not None else text[-1]
    assert index(text, 3, always=True).propose() == expected


def test_nothing_is_proposed_for_an_empty_text() -> None:
    assert SuffixIndex(1, always=True).propose() is None


def test_only_so_many_places_are_compared() -> None:
    """The longest match of all stands before the last MAX_CANDIDATES ones."""
    old, recent = [9, 1, 2, 7], [8, 1, 2, 5] * lookup.MAX_CANDIDATES
    assert index([*old, *recent, 9, 1, 2]).propose() == 5
    assert index([*old, *recent[4:], 9, 1, 2]).propose() == 7
