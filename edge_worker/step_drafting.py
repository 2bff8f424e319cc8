"""The draft's side of an answer in steps: writes one version after the other, and hands its tokens
to the sessions in which the target writes its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from bus.protocol.errors import LocalError
from decoding.cascade import Cascade
from decoding.common import common_length
from decoding.edge_events import Draft, Learn
from decoding.edge_state import SessionSpec
from decoding.engine import DraftedWindow, Drafter
from decoding.steps import DraftStep
from edge_worker.drafting import Deliver, ModelDrafting, answered
from edge_worker.text import StepText
from engines.thread import ModelThread, now_ms

CHUNK = 4
"""Tokens that are drafted before they are looked at: those after a step's end are wasted [ours]."""


class Drafts(Protocol):
    """Takes what is drafted. Called on the event loop."""

    def wrote(self, index: int, tokens: tuple[int, ...]) -> None:
        """More tokens of step `index`, the first of these at its end or in its middle."""
        ...

    def drafted(self, index: int, step: StepText, draft_ms: float) -> None:
        """Step `index` has ended."""
        ...

    def ran(self, start: int, num_tokens: int, draft_ms: float, ended_ms: float) -> None:
        """A piece of work has ended; `start` is an absolute position."""
        ...


class StepDrafting:
    """Writes steps with a drafter, one at a time.

    Args:
        tokenizer: of the drafter. drafts: takes what comes of it.
    """

    def __init__(
        self, drafter: Drafter[Any], thread: ModelThread, tokenizer: Any, drafts: Drafts
    ) -> None:
        self._model = ModelDrafting(drafter, thread)
        self._tokenizer = tokenizer
        self._drafts = drafts
        self._text: tuple[int, ...] = ()  # what the drafter has read, and the last token
        self._num_read = 0
        self._job = 0
        self._step: DraftStep | None = None
        self._eos: frozenset[int] = frozenset()
        self._version: StepText
        self._draft_ms = 0.0

    def open(self, spec: SessionSpec, failed: Callable[[Exception], None]) -> None:
        """The answer begins; `failed` gets what a job raises.

        Raises:
            Exception: what the engine raises; then there is nothing to close.
        """
        self._model.open(spec, self._arrived, failed)

    def draft(self, step: DraftStep, eos: frozenset[int]) -> None:
        """Write a step; the one before has ended or been dropped."""
        common = common_length(self._text[: self._num_read], step.prefix[:-1])
        self._model.crop(common)
        self._text, self._num_read = step.prefix, common
        self._step, self._eos, self._draft_ms = step, eos, 0.0
        self._version = StepText(self._tokenizer, eos, step.max_tokens)
        self._go_on(step)

    def drop(self, first: int) -> None:
        """Steps from `first` on are not wanted any more."""
        if self._step is not None and self._step.index >= first:
            self._step, self._job = None, self._job + 1

    def close(self) -> None:
        """The answer is over. A second call changes nothing."""
        self.drop(0)
        self._model.close()

    def _go_on(self, step: DraftStep) -> None:
        self._job += 1
        job, count = self._job, min(CHUNK, step.max_tokens - len(self._version.tokens))
        effect = Draft(job, self._text[self._num_read :], count)
        self._model.draft(effect, self._eos, lambda: self._job != job)

    def _arrived(self, job: int, window: DraftedWindow) -> None:
        self._drafts.ran(window.start, len(window.tokens), window.draft_ms, now_ms())
        step = self._step
        if job != self._job or step is None:
            return
        if not window.tokens:
            raise LocalError("the draft wrote nothing; expected a token of a step")
        taken = self._version.push(window.tokens)
        self._text += taken
        self._num_read = min(window.num_cached, len(self._text) - 1)
        self._draft_ms += window.draft_ms
        self._drafts.wrote(step.index, taken)
        if not self._version.ended:
            self._go_on(step)
            return
        self._step = None
        self._drafts.drafted(step.index, self._version, self._draft_ms)


class GivenDrafting:
    """`edge_worker.drafting.Drafting` of tokens that come from elsewhere, after the prompt. Where
    the text has turned another way, or has all of them, a draft is not answered."""

    def __init__(self) -> None:
        self._cascade = Cascade()
        self._given: tuple[int, ...] = ()  # after the prompt
        self._eos: frozenset[int] = frozenset()
        self._deliver: Deliver

    def open(
        self, spec: SessionSpec, deliver: Deliver, failed: Callable[[Exception], None]
    ) -> None:
        del failed
        self._deliver, self._given = deliver, spec.prompt + self._given

    def give(self, tokens: tuple[int, ...]) -> None:
        """More tokens, after those given before."""
        self._given += tokens
        self._answer()

    def draft(self, effect: Draft, eos: frozenset[int], stop: Callable[[], bool]) -> None:
        del stop  # nothing takes long
        self._cascade, self._eos = self._cascade.ask(effect), eos
        self._answer()

    def crop(self, length: int) -> None:
        self._cascade = self._cascade.cropped(length)

    def learn(self, effect: Learn) -> None:
        del effect  # it reads no features

    def close(self) -> None:
        self._cascade = self._cascade.dropped()

    def _answer(self) -> None:
        """Answer what was asked, if it can be: a turn of the loop later, as a model would."""
        self._cascade, answer = self._cascade.answer(self._given, self._eos)
        if answer is not None:
            window = answered(self._cascade, answer, waited_ms=0.0)
            asyncio.get_running_loop().call_soon(self._deliver, answer.asked.job, window)
