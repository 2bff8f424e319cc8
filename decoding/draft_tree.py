"""The drafts of one session that wait at the cloud, as a tree of tokens.

A window names the position it starts at and the hash of the whole text it was drafted after
(`decoding.prefix_hash`); its tokens hang there. Windows may come in any order, twice, overlap, or
belong to texts that the target has turned away from: such a draft hangs where nothing leads, and
goes when the committed text has passed it. Nothing is ever cancelled.

    committed text ──► token ──► token ──► …        the path that a pass verifies
                         └─────► token ──► …        another branch

At a fork a path takes the draft's own choice before a branch after its second one, and else what
is longest. A tree holds at most `MAX_TOKENS` tokens of `MAX_WINDOWS` windows. Where a window is too
many, one goes that nothing leads to, and else any: the one that starts furthest from the committed
text, of equals the newest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Generic, TypeVar

from msgspec import Struct

from decoding.prefix_hash import chain

MAX_TOKENS = 1024
"""Drafted tokens that wait for one session [ours]."""
MAX_WINDOWS = 64
"""Windows that wait for one session [ours]."""

Source = TypeVar("Source")


class Drafted(Struct, Generic[Source], frozen=True):
    """A window that waits.

    Attributes:
        start: absolute position of its first token.
        hashes: bytes[8] each: of the text it follows, then with each of its tokens.
        source: what it came in.
        branch: it follows a second choice of the draft.
    """

    start: int
    tokens: tuple[int, ...]
    hashes: tuple[bytes, ...]
    source: Source
    branch: bool = False

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + len(self.tokens)


class Place(Struct, Generic[Source], frozen=True):
    """A drafted token on a path: which window it is of, and the how-manieth there."""

    drafted: Drafted[Source]
    index: int

    @property
    def token(self) -> int:
        return self.drafted.tokens[self.index]


def drafted(
    start: int, follows: bytes, tokens: tuple[int, ...], source: Source, branch: bool = False
) -> Drafted[Source]:
    """A window as it hangs in a tree."""
    return Drafted(start, tokens, tuple(chain(follows, tokens)), source, branch)


class DraftTree(Struct, Generic[Source], frozen=True):
    """The windows that wait, in order of arrival."""

    windows: tuple[Drafted[Source], ...] = ()

    def add(self, window: Drafted[Source], length: int, text: bytes) -> DraftTree[Source]:
        """With one more window; what is here already changes nothing.

        Args:
            length: of the committed text; `text` its hash.
        """
        if any(w.start == window.start and w.hashes == window.hashes for w in self.windows):
            return self
        kept = [*self.windows, window]
        while len(kept) > MAX_WINDOWS or sum(len(w.tokens) for w in kept) > MAX_TOKENS:
            led = _led_to(kept, length, text)
            furthest = max(range(len(kept)), key=lambda i: (not led[i], kept[i].start, i))
            del kept[furthest]
        return DraftTree(tuple(kept))

    def continues(self, length: int, text: bytes) -> bool:
        """Whether a drafted token follows the text of so many tokens and this hash."""
        return any(
            w.start <= length < w.end and w.hashes[length - w.start] == text for w in self.windows
        )

    def path(self, length: int, text: bytes, most: int) -> tuple[Place[Source], ...]:
        """The drafted tokens that continue a text: the longest of them, of equals the oldest; those
        after a second choice only where there are no others.

        Args:
            length: of the text; `text` its hash.
            most: tokens wanted.
        """
        if not self.continues(length, text):
            return ()
        if len(self.windows) == 1:
            (window,) = self.windows
            begin = length - window.start
            end = min(len(window.tokens), begin + most)
            return tuple(Place(window, index) for index in range(begin, end))
        following = self._following()
        paths: list[tuple[Place[Source], ...]] = []
        branches: list[tuple[Place[Source], ...]] = [()]
        while branches:
            branch = branches.pop()
            at = text if not branch else branch[-1].drafted.hashes[branch[-1].index + 1]
            steps = following.get((length + len(branch), at), ()) if len(branch) < most else ()
            if not steps:
                paths.append(branch)
            chosen = [step for step in steps if not step.drafted.branch] or steps
            branches += [(*branch, step) for step in chosen]
        return max(reversed(paths), key=len)

    def after(self, length: int, text: bytes) -> DraftTree[Source]:
        """Without what the committed text has passed or contradicts.

        Args:
            length: of the committed text; `text` its hash.
        """
        return DraftTree(tuple(w for w in self.windows if _may_follow(w, length, text)))

    def _following(self) -> dict[tuple[int, bytes], tuple[Place[Source], ...]]:
        """The tokens that hang at each (position, hash), each once."""
        found: dict[tuple[int, bytes], dict[bytes, Place[Source]]] = {}
        for window in self.windows:
            for index, (before, after) in enumerate(pairwise(window.hashes)):
                here = found.setdefault((window.start + index, before), {})
                known = here.get(after)
                if known is None or (known.drafted.branch and not window.branch):
                    here[after] = Place(window, index)
        return {place: tuple(steps.values()) for place, steps in found.items()}


def _may_follow(window: Drafted[Source], length: int, text: bytes) -> bool:
    """Whether a window has tokens from the committed text's end on, and agrees with that text as
    far as it overlaps it. What starts later may yet be led to."""
    if window.start > length:
        return True
    return window.end > length and window.hashes[length - window.start] == text


def _led_to(windows: Sequence[Drafted[Source]], length: int, text: bytes) -> list[bool]:
    """Of each window, whether the committed text or drafts after it lead to its first token.

    Args:
        length: of the committed text; `text` its hash.
    """
    led, ends = [False] * len(windows), {text}
    for index in sorted(range(len(windows)), key=lambda i: windows[i].start):
        window = windows[index]
        if _may_follow(window, length, text):
            led[index] = window.start <= length or window.hashes[0] in ends
        if led[index]:
            ends.update(window.hashes)
    return led
