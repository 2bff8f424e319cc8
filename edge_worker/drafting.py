"""Who answers a session's `Draft` effects: here a drafter on the worker's model thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

from msgspec.structs import replace

from decoding.cascade import Answer, Cascade
from decoding.edge_events import Draft, Learn
from decoding.edge_state import SessionSpec
from decoding.engine import DraftedWindow, Drafter, FeatureDrafter
from decoding.sampling import SamplingParams
from decoding.token_features import unpacked
from decoding.token_rows import Rows
from engines.row import given_rows
from engines.thread import ModelThread, Turns, now_ms

Deliver = Callable[[int, DraftedWindow], None]
"""Takes the number of a draft job and what came of it, interrupted or not."""


class Drafting(Protocol):
    """Drafts for one session. Called on the event loop, in the order of its machine's effects."""

    def open(
        self, spec: SessionSpec, deliver: Deliver, failed: Callable[[Exception], None]
    ) -> None:
        """The session begins.

        Args:
            deliver: gets the result of each `draft`, later, on the event loop.
            failed: gets what a job raises.

        Raises:
            Exception: what the engine raises; then there is nothing to close.
        """
        ...

    def draft(self, effect: Draft, eos: frozenset[int], stop: Callable[[], bool]) -> None:
        """Read the effect's feed, then draft up to its count of tokens.

        Args:
            eos: nothing follows a token of these.
            stop: whether the result is not wanted any more; asked on any thread.
        """
        ...

    def crop(self, length: int) -> None:
        """Forget what was read or drafted from absolute position `length` on."""
        ...

    def learn(self, effect: Learn) -> None:
        """Take the target's features; only with a method that reads them."""
        ...

    def close(self) -> None:
        """The session is over. A second call changes nothing."""
        ...


def answered(
    cascade: Cascade, answer: Answer, waited_ms: float, rows: Rows = (),
    sampling: SamplingParams | None = None,
) -> DraftedWindow:  # fmt: skip
    """Tokens of another session's text, or of another drafter's, as a window.

    Args:
        cascade: with the answer given.
        rows: of the text's tokens, from its beginning; those of which nothing is known are certain.
        sampling: of the session that drafts; needed with rows.
    """
    start = answer.asked.start
    known = rows[start : start + len(answer.tokens)]
    sent = given_rows(answer.tokens, known, sampling or SamplingParams())
    return DraftedWindow(start, len(cascade.text), answer.tokens, *sent, waited_ms)


class ModelDrafting:
    """A drafter on the model thread, a chunk of prefill or one window at a time, so sessions take
    turns; a crop and what is learnt ride along with the next job."""

    def __init__(self, drafter: Drafter[Any], thread: ModelThread) -> None:
        self._drafter = drafter
        self._thread = thread
        self._cache: Any = None
        self._crop_to: int | None = None
        self._learnt: list[Learn] = []  # on the event loop until a job takes it
        self._turns: Turns
        self._deliver: Deliver

    def open(
        self, spec: SessionSpec, deliver: Deliver, failed: Callable[[Exception], None]
    ) -> None:
        self._cache = self._drafter.open(spec.sampling, spec.prompt)
        self._turns, self._deliver = self._thread.turns(failed), deliver

    def draft(self, effect: Draft, eos: frozenset[int], stop: Callable[[], bool]) -> None:
        """A long feed (a prompt) in chunks, so that other sessions get turns between them."""
        crop_to, self._crop_to = self._crop_to, None
        feed, crop_to = self._turns.prefill(effect.feed, crop_to, self._prefill)
        learnt, self._learnt = self._learnt, []
        self._turns.submit(
            partial(self._window, effect.count, feed, crop_to, learnt, eos, stop),
            partial(self._deliver, effect.job),
        )

    def crop(self, length: int) -> None:
        pending = self._crop_to
        self._crop_to = length if pending is None else min(pending, length)

    def learn(self, effect: Learn) -> None:
        self._learnt.append(effect)

    def close(self) -> None:
        """A window that is being drafted ends at its next token. The cache then goes to the model's
        prefix cache, on the model thread."""
        self._turns.close(partial(self._drafter.close, self._cache))

    # --- on the model thread --------------------------------------------------------------

    def _prefill(self, tokens: tuple[int, ...], crop_to: int | None) -> None:
        self._keep(crop_to)
        self._drafter.prefill(self._cache, tokens)

    def _window(
        self, count: int, feed: tuple[int, ...], crop_to: int | None, learnt: list[Learn],
        eos: frozenset[int], stop: Callable[[], bool],
    ) -> DraftedWindow:  # fmt: skip
        """Roll the cache back, learn and draft; all is the model's time."""
        began_ms = now_ms()
        self._keep(crop_to)
        for effect in learnt:
            drafter = cast(FeatureDrafter[Any], self._drafter)
            drafter.learn(self._cache, effect.start, unpacked(effect.features))
        window = self._drafter.draft(self._cache, feed, count, eos, stop=stop)
        return replace(window, draft_ms=now_ms() - began_ms)

    def _keep(self, crop_to: int | None) -> None:
        if crop_to is not None:
            self._drafter.keep(self._cache, min(crop_to, self._drafter.length(self._cache)))
