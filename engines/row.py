"""Several drafters in a row: the first that has something to say writes the next token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from bus.protocol.arrays import PROB_DTYPE, TOKEN_DTYPE, Float16Array, Int32Array
from bus.protocol.errors import LocalError
from decoding.engine import DraftedWindow, Drafter, FeatureDrafter
from decoding.methods.base import Proposal
from decoding.sampling import SamplingParams
from decoding.token_rows import Rows


@dataclass(slots=True)
class RowCache:
    """A session's caches, one for each drafter."""

    caches: list[Any]


class DrafterRow:
    """Asks its drafters token by token, in order; one that was not asked catches up when it is.

    Positions are counted by the last drafter, the one that always has something to say.
    """

    def __init__(self, *drafters: Drafter[Any]) -> None:
        """At least one; the narrowest context and vocabulary are those of the row, which can do
        what its last drafter can."""
        self._drafters = drafters
        self.capabilities = drafters[-1].capabilities
        self.vocab_size = min(drafter.vocab_size for drafter in drafters)
        self.context_length = min(drafter.context_length for drafter in drafters)

    def open(self, sampling: SamplingParams, prompt: Sequence[int] = ()) -> RowCache:
        """An empty cache for a new session."""
        return RowCache([drafter.open(sampling, prompt) for drafter in self._drafters])

    def length(self, cache: RowCache) -> int:
        """Positions the last drafter has read."""
        return self._drafters[-1].length(cache.caches[-1])

    def prefill(self, cache: RowCache, tokens: Sequence[int]) -> None:
        """Read tokens without drafting."""
        self._align(cache)
        for drafter, own in zip(self._drafters, cache.caches, strict=True):
            drafter.prefill(own, tokens)

    def draft(
        self,
        cache: RowCache,
        feed: Sequence[int],
        count: int,
        eos: frozenset[int],
        stop: Callable[[], bool],
    ) -> DraftedWindow:
        """As `decoding.engine.Drafter.draft`. The last drafter may have read less than all but the
        last token: those that others wrote since it was last asked."""
        began = time.perf_counter()
        self._align(cache)
        base = self.length(cache)
        text = list(feed)
        windows: list[DraftedWindow] = []
        while len(windows) < count and not stop():
            window = self._next(cache, text, base)
            windows.append(window)
            text += window.tokens
            if not window.tokens or window.tokens[0] in eos:
                break
        width = max((window.q_ids.shape[1] for window in windows if window.tokens), default=1)
        rows = [widened(window, width) for window in windows if window.tokens]
        return DraftedWindow(
            base + len(feed),
            self.length(cache),
            tuple(text[len(feed) :]),
            np.concatenate([ids for ids, _ in rows] or [np.empty((0, 1), TOKEN_DTYPE)]),
            np.concatenate([probs for _, probs in rows] or [np.empty((0, 1), PROB_DTYPE)]),
            1e3 * (time.perf_counter() - began),
        )

    def keep(self, cache: RowCache, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            LocalError: the last drafter holds fewer.
        """
        if length > self.length(cache):
            raise LocalError(f"cannot keep {length} positions of {self.length(cache)}")
        for drafter, own in zip(self._drafters, cache.caches, strict=True):
            drafter.keep(own, min(length, drafter.length(own)))

    def learn(self, cache: RowCache, start: int, features: Float16Array) -> None:
        """As `decoding.engine.FeatureDrafter.learn`, for the last drafter."""
        cast(FeatureDrafter[Any], self._drafters[-1]).learn(cache.caches[-1], start, features)

    def close(self, cache: RowCache) -> None:
        """The session has ended."""
        for drafter, own in zip(self._drafters, cache.caches, strict=True):
            drafter.close(own)

    def _align(self, cache: RowCache) -> None:
        """Nobody is ahead of the last drafter: what it has not read may have been rejected."""
        self.keep(cache, self.length(cache))

    def _next(self, cache: RowCache, text: list[int], base: int) -> DraftedWindow:
        """One token after `text`, which begins at position `base`."""
        window: DraftedWindow | None = None
        for drafter, own in zip(self._drafters, cache.caches, strict=True):
            missing = text[drafter.length(own) - base :]
            window = drafter.draft(own, missing, 1, frozenset(), _never)
            if window.tokens:
                break
        assert window is not None
        return window


def certain(token: int, size: int) -> tuple[Int32Array, Float16Array]:
    """The one-hot distribution as `size` entries in canonical order: int32[K], float16[K]."""
    ids, probs = np.zeros(size, dtype=TOKEN_DTYPE), np.zeros(size, dtype=PROB_DTYPE)
    ids[0], probs[0] = token, 1.0
    ids[1:] = np.arange(size - 1)
    return ids, probs


def certain_rows(tokens: Sequence[int]) -> tuple[Int32Array, Float16Array]:
    """Of tokens drafted with certainty: int32[n, 1], float16[n, 1]."""
    ids = np.array(tokens, TOKEN_DTYPE).reshape(-1, 1)
    return ids, np.ones(ids.shape, PROB_DTYPE)


def given_rows(
    tokens: Sequence[int], known: Rows, sampling: SamplingParams
) -> tuple[Int32Array, Float16Array]:
    """Of tokens that another model has written: its own rows where they are known, else certain
    ones, so that such a token counts as the draft's only choice. The same where a row rules its
    token out: what travels are the most probable tokens alone, and the model may choose others.

    Args:
        known: of each token, or of none.

    Returns:
        int32[n, K], float16[n, K].
    """
    arrays = {i: row.arrays() for i, row in enumerate(known) if row is not None}
    usable = {i: row for i, row in arrays.items() if Proposal(tokens[i], *row, sampling).possible}
    if not usable:
        return certain_rows(tokens)
    width = max(ids.size for ids, _ in usable.values())
    rows = [
        usable[i] if i in usable and usable[i][0].size == width else certain(token, width)
        for i, token in enumerate(tokens)
    ]
    return np.stack([ids for ids, _ in rows]), np.stack([probs for _, probs in rows])


def widened(window: DraftedWindow, width: int) -> tuple[Int32Array, Float16Array]:
    """The rows of a window of one token with `width` entries: int32[1, K], float16[1, K]."""
    if window.q_ids.shape[1] == width:
        return window.q_ids, window.q_probs
    ids, probs = certain(window.tokens[0], width)  # narrower rows are those of certain tokens
    return ids[None], probs[None]


def _never() -> bool:
    return False
