from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.stopping import StopScanner

letters = st.text("ab", max_size=8)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def scan(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    shown = "".join(scanner.push(piece) for piece in pieces)
    return shown + scanner.flush(), scanner.matched


@settings(max_examples=300, deadline=None)
@given(stops=stop_lists, pieces=st.lists(letters, max_size=8))
def test_what_is_shown_never_ends_in_what_may_become_a_stop_string(
    stops: list[str], pieces: list[str]
) -> None:
    scanner, shown, pushed = StopScanner(stops), "", ""
    for piece in pieces:
        shown += scanner.push(piece)
        if scanner.matched:
            break
        pushed += piece
        held = pushed.removeprefix(shown)
        assert shown + held == pushed  # nothing lost, nothing doubled, nothing changed
        overhangs = [n for s in stops for n in range(len(s)) if pushed.endswith(s[:n])]
        assert len(held) == max(overhangs, default=0)  # all that is dangerous, and no more
    assert not any(stop in shown for stop in stops)
    if not scanner.matched:
        assert shown + scanner.flush() == pushed
        assert scanner.flush() == ""


@settings(max_examples=300, deadline=None)
@given(stops=stop_lists, pieces=st.lists(letters, max_size=8))
def test_the_answer_ends_before_the_first_stop_string(stops: list[str], pieces: list[str]) -> None:
    """First to be completed, then first to begin: both as text comes piece by piece."""
    text, matched = scan(stops, pieces)
    whole, so_far = "".join(pieces), ""
    for piece in pieces:
        so_far += piece
        begins = [so_far.find(stop) for stop in stops if stop in so_far]
        if begins:
            assert (text, matched) == (so_far[: min(begins)], True)
            return
    assert (text, matched) == (whole, False)


@settings(max_examples=200, deadline=None)
@given(stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), text=letters)
def test_one_stop_string_is_found_however_the_text_is_cut(stops: list[str], text: str) -> None:
    for stop in stops:
        assert scan([stop], list(text)) == scan([stop], [text])


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "matched"),
    [
        ([], ["any", "thing"], "anything", False),
        (["\n\n"], ["one\n", "two\n", "\nthree"], "one\ntwo", True),
        (["END"], ["the E", "N", "D of it"], "the ", True),
        (["END"], ["the E", "N", "d of it"], "the ENd of it", False),
        (["bc", "abcd"], ["abc"], "a", True),
        (["later", "now"], ["right now or later"], "right ", True),
        (["x"], ["x"], "", True),
        (["aab"], ["aaab"], "a", True),  # a start that fails holds a later start
        (["é"], ["caf", "é"], "caf", True),
    ],
)
def test_examples(stops: list[str], pieces: list[str], expected: str, matched: bool) -> None:
    assert scan(stops, pieces) == (expected, matched)


def test_after_a_match_nothing_more_is_shown() -> None:
    scanner = StopScanner(["stop"])
    assert scanner.push("before stop after") == "before "
    assert scanner.matched
    assert scanner.push("more") == ""
    assert scanner.flush() == ""
