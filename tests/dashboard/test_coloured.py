"""An answer's text in the colours of its origin, and feedback in words."""

from __future__ import annotations

from typing import Any

import pytest

from bus.store.entries import TokensEntry
from dashboard.coloured import DRAFT_COLOUR, TARGET_COLOUR, as_html, why
from tests.dashboard.conftest import window

OWN: dict[str, Any] = {
    "outcome": "own", "number": 0, "num_drafted": 0, "num_accepted": 0, "num_committed": 1,
    "rollback": False,
}  # fmt: skip


def piece(start: int, *accepted: bool) -> TokensEntry:
    count = len(accepted)
    return TokensEntry(
        "0-1", start, tuple(range(count)), accepted, "abcdef"[start : start + count], 1,
        (1,) * count,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (OWN, "the target's own, without a draft"),
        (OWN | {"rollback": True}, "the target's own, without a draft"),
        ({"num_accepted": 4, "rollback": False}, "all accepted"),
        ({"rollback": False}, "the answer ended"),
        ({"outcome": "prehit_rejected"}, "first token refused by the kept row, without a pass"),
        ({}, "token 4 of 4 refused: the exact test"),
    ],
)
def test_feedback_is_said_in_words(facts: dict[str, Any], words: str) -> None:
    assert why(window("r", **facts), lossless=True) == words


def test_what_the_target_wrote_by_itself_has_its_colour_and_refuses_nothing() -> None:
    """A window of which one token was refused, then two passes without a window."""
    windows = [
        window("r", num_accepted=1, num_drafted=3, num_committed=2),
        window("r", **OWN), window("r", **OWN),
    ]  # fmt: skip
    shown = as_html([piece(0, True, False), piece(2, False), piece(3, False)], windows)
    assert f'background:{DRAFT_COLOUR};border-radius:3px">a</span>' in shown
    for letter in "bcd":
        assert f'background:{TARGET_COLOUR};border-radius:3px">{letter}</span>' in shown
    assert shown.count("✗") == 1
    assert shown.index(">b<") < shown.index("✗2") < shown.index(">c<")


def test_drafts_that_the_targets_own_text_overtook_are_not_refused_tokens() -> None:
    """They were on their way, or being drafted: no window of theirs was judged."""
    windows = [window("r", **(OWN | {"rollback": True}))]
    assert "✗" not in as_html([piece(0, False)], windows)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"rollback": False}, "step accepted: alike by exact match"),
        ({"rollback": True}, "step refused by exact match; the target's own step instead"),
    ],
)
def test_feedback_of_a_step_names_its_judge(facts: dict[str, Any], words: str) -> None:
    assert why(window("r", **facts), lossless=True, judge="exact match") == words


def test_feedback_of_a_tree_says_how_large_it_was_and_how_much_was_accepted() -> None:
    tree = window("r", number=0, proposed=8, num_drafted=3, num_accepted=2, rollback=False)
    assert why(tree, lossless=True) == "tree of 8 tokens, depth 3: 2 accepted"
    assert "\u2717" not in as_html([piece(0, True, True, False)], [tree])
