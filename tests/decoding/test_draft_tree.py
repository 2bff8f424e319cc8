"""Drafts that wait: what continues a text is found whatever order it came in."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from decoding.draft_tree import MAX_TOKENS, MAX_WINDOWS, DraftTree, drafted
from decoding.prefix_hash import chain, prompt_hash

PROMPT = (7, 8, 9)
ROOT = prompt_hash(PROMPT)
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=8).map(tuple)


def hash_of(text: tuple[int, ...]) -> bytes:
    return list(chain(ROOT, text))[-1]


def window(text: tuple[int, ...], begin: int, end: int) -> object:
    return drafted(len(PROMPT) + begin, hash_of(text[:begin]), text[begin:end], (text, begin, end))


def tree_of(*windows: object) -> DraftTree[object]:
    tree: DraftTree[object] = DraftTree()
    for one in windows:
        tree = tree.add(one, len(PROMPT), ROOT)  # type: ignore[arg-type]
    return tree


def path_tokens(tree: DraftTree[object], text: tuple[int, ...], most: int = 64) -> tuple[int, ...]:
    path = tree.path(len(PROMPT) + len(text), hash_of(text), most)
    return tuple(place.token for place in path)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    text = draw(TEXTS)
    bounds = sorted(draw(st.sets(st.integers(1, len(text) - 1))) if len(text) > 1 else ())
    edges = [0, *bounds, len(text)]
    return text, list(pairwise(edges))


@given(cuts(), st.randoms(), st.integers(0, 8))
def test_a_draft_is_found_whole_whatever_order_its_windows_came_in(
    cut: tuple[tuple[int, ...], list[tuple[int, int]]], random: object, committed: int
) -> None:
    text, pieces = cut
    windows = [window(text, begin, end) for begin, end in pieces]
    random.shuffle(windows)  # type: ignore[attr-defined]
    tree = tree_of(*windows, *windows)
    assert len(tree.windows) == len(windows)
    committed = min(committed, len(text))
    assert path_tokens(tree, text[:committed]) == text[committed:]


@given(st.lists(TEXTS, min_size=1, max_size=6), TEXTS)
def test_a_path_is_the_longest_draft_that_agrees(
    texts: list[tuple[int, ...]], committed: tuple[int, ...]
) -> None:
    tree = tree_of(*(window(text, 0, len(text)) for text in texts))
    agree = [t[len(committed) :] for t in texts if t[: len(committed)] == committed]
    longest = max((len(t) for t in agree), default=0)
    found = path_tokens(tree, committed)
    assert len(found) == longest
    assert not found or found in agree
    after = tree.after(len(PROMPT) + len(committed), hash_of(committed))
    assert path_tokens(after, committed) == found
    assert {w.source for w in after.windows} == {
        (t, 0, len(t)) for t in texts if t[: len(committed)] == committed != t
    }


def test_a_path_is_cut_and_a_gap_ends_it() -> None:
    text = (1, 2, 3, 4, 5, 6)
    tree = tree_of(window(text, 0, 2), window(text, 3, 6))
    assert path_tokens(tree, ()) == (1, 2)
    assert path_tokens(tree, (), most=1) == (1,)
    assert path_tokens(tree, text[:4]) == (5, 6)
    assert path_tokens(tree.add(window(text, 2, 3), len(PROMPT), ROOT), ()) == text  # type: ignore[arg-type]


def test_what_starts_later_waits_until_it_is_passed() -> None:
    text = (1, 2, 3, 4)
    tree = tree_of(window(text, 2, 4))
    assert tree.after(len(PROMPT) + 1, hash_of((9,))).windows == tree.windows
    assert not tree.after(len(PROMPT) + 2, hash_of((9, 9))).windows
    assert not tree.after(len(PROMPT) + 4, hash_of(text)).windows


def test_a_full_tree_drops_what_starts_furthest() -> None:
    text = tuple(range(2 * MAX_WINDOWS))
    tree = tree_of(*(window(text, i, i + 1) for i in reversed(range(2 * MAX_WINDOWS))))
    assert path_tokens(tree, ()) == text[:MAX_WINDOWS]
    long = tuple(range(MAX_TOKENS + 5))
    tree = tree_of(*(window(long, i, i + 5) for i in range(0, MAX_TOKENS + 5, 5)))
    assert sum(len(w.tokens) for w in tree.windows) <= MAX_TOKENS
    assert path_tokens(tree, (), most=10) == long[:10]


def test_drafts_that_nothing_leads_to_go_first() -> None:
    """After a rejection the drafts of before it still hang here, as far away as those after it."""
    old = (0,) * MAX_WINDOWS
    tree = tree_of(*(window(old, i, i + 1) for i in range(MAX_WINDOWS)))
    new = (1,) * MAX_WINDOWS
    length, text = len(PROMPT) + 1, hash_of(new[:1])
    tree = tree.after(length, text)
    for i in range(1, MAX_WINDOWS):
        tree = tree.add(window(new, i, i + 1), length, text)  # type: ignore[arg-type]
        assert path_tokens(tree, new[:1]) == new[1 : i + 1]
        assert len(tree.windows) <= MAX_WINDOWS
