"""Chain: a chain of three stages over scripted links, with toy models and a virtual clock.

Two `EdgeCloudPair`s on one clock: the outer one is verified by the target, the inner one by a
middle model, and `decoding.cascade` makes the inner text the outer drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bus.protocol.arrays import Float64Array
from decoding import edge, edge_events
from decoding.cascade import Cascade
from decoding.methods import Method, pipespec
from edge_worker.drafting import answered
from edge_worker.stages import inner_spec
from tests.harness import EdgeCloudPair, Fate
from tests.toy import ToyDraft, ToyPair


@dataclass(frozen=True)
class Middle(ToyPair):
    """A middle model: its logits are the target's to the part `closeness`."""

    closeness: float = 0.8

    def target_logits(self, prefix: tuple[int, ...]) -> Float64Array:
        own = self._noise(prefix, 3) * 2.0
        return self.closeness * super().target_logits(prefix) + (1 - self.closeness) * own


class Reading:
    """The cascade as the outer session's draft cache."""

    def __init__(self) -> None:
        self.cascade = Cascade()

    @property
    def cache(self) -> tuple[int, ...]:
        return self.cascade.text

    def crop(self, length: int) -> None:
        self.cascade = self.cascade.cropped(length)


@dataclass
class Inner(EdgeCloudPair):
    """The inner session, on the clock of the outer one.

    `silent` of ten positions the drafter has nothing to say at.
    """

    outer: Any = None
    silent: int = 0

    @property
    def now_ms(self) -> float:
        return float(self.outer.now_ms)

    @now_ms.setter
    def now_ms(self, value: float) -> None:
        pass

    def _at(self, delay_ms: float, action: Callable[[], None]) -> None:
        self.outer._at(delay_ms, action)

    def _run_edge(self, effects: tuple[edge_events.Effect, ...]) -> None:
        super()._run_edge(effects)
        if any(isinstance(effect, edge_events.Commit) for effect in effects):
            self._at(0.0, self.outer.answer_draft)

    def _run_draft(self, job: int, feed: tuple[int, ...], count: int) -> None:
        start = len(self._draft.cache) + len(feed)
        if hash((start, feed[-1])) % 10 >= self.silent:
            super()._run_draft(job, feed, count)
            return
        draft = self._draft
        assert isinstance(draft, ToyDraft)
        draft.cache += feed
        ids, probs = np.empty((0, 1), np.int32), np.empty((0, 1), np.float16)
        event = edge_events.Drafted(job, start, start, (), ids, probs, 0.0, self.now_ms)
        self._at(self.draft_ms, lambda: self._step_edge(event))

    def rebase(self, text: tuple[int, ...]) -> None:
        self.answer, self.finished = text[len(self.prompt) :], None
        self.edge, effects = edge.step(self.edge, edge_events.Rebased(text, self.now_ms))
        self._run_edge(effects)

    def read(self, length: int) -> None:
        self._step_edge(edge_events.Read(length, self.now_ms))


@dataclass
class Chain(EdgeCloudPair):
    """Edge drafter → middle model → target."""

    middle: ToyPair = Middle()
    silent: int = 0
    inner_fates: tuple[Fate, ...] = ()
    inner_forget_at: frozenset[int] = frozenset()
    middle_ms: float = 4.0
    inner_lease: int = 256
    method: Method = pipespec.METHOD

    def __post_init__(self) -> None:
        self.inner: Inner | None = None
        self.restarts = 0
        self.reading = Reading()
        super().__post_init__()
        self._draft: Any = self.reading

    def _run_draft(self, job: int, feed: tuple[int, ...], count: int) -> None:
        self.reading.cascade = self.reading.cascade.ask(edge_events.Draft(job, feed, count))
        text = self.reading.cascade.text
        if self.inner is None:
            self.inner = Inner(
                self.middle, self.sampling, self.prompt, self.max_new_tokens, self.eos,
                pipespec.TWO, self.windows, self.inner_fates, self.inner_forget_at,
                committed=text[len(self.prompt) :], draft_ms=0.5, verify_ms=self.middle_ms,
                outer=self, silent=self.silent, lease=self.inner_lease,
                rows=inner_spec(self.edge.spec, pipespec.TWO).rows,
            )  # fmt: skip
        elif self.reading.cascade.begins_again(self.inner.edge.tokens):
            self.restarts += 1
            self.inner.rebase(text)
        self.inner.read(len(text))
        self._at(0.0, self.answer_draft)

    def answer_draft(self) -> None:
        assert self.inner is not None
        cascade, answer = self.reading.cascade.answer(self.inner.edge.tokens, self.eos)
        self.reading.cascade = cascade
        if answer is None:
            return
        window = answered(cascade, answer, 1.0, self.inner.edge.rows, self.sampling)
        self._step_edge(
            edge_events.Drafted(
                answer.asked.job, window.start, window.num_cached, window.tokens, window.q_ids,
                window.q_probs, window.draft_ms, self.now_ms,
            )
        )  # fmt: skip
