"""Real models as a pair of `tests.harness`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bus.protocol.arrays import Float16Array, Int32Array
from decoding.sampling import SamplingParams
from engines.torch.drafter import DraftCache, ModelDrafter
from engines.torch.speculators.drafter import Eagle3Cache, Eagle3Drafter
from engines.torch.target import TargetCache, TargetModel


class SessionDraft:
    """A drafter with the cache of one session."""

    def __init__(self, drafter: ModelDrafter | Eagle3Drafter, sampling: SamplingParams) -> None:
        self._drafter: Any = drafter
        self._cache: DraftCache | Eagle3Cache = drafter.open(sampling)

    @property
    def cache(self) -> tuple[int, ...]:
        if isinstance(self._cache, Eagle3Cache):
            return tuple(self._cache.tokens)
        return tuple(self._cache.prefix.tokens)

    def learn(self, start: int, features: Float16Array) -> None:
        self._drafter.learn(self._cache, start, features)

    def draft(
        self, feed: tuple[int, ...], count: int, eos: frozenset[int]
    ) -> tuple[int, tuple[int, ...], Int32Array, Float16Array]:
        window = self._drafter.draft(self._cache, feed, count, eos, lambda: False)
        return window.start, window.tokens, window.q_ids, window.q_probs

    def crop(self, length: int) -> None:
        self._drafter.keep(self._cache, length)


@dataclass(frozen=True)
class ModelPair:
    """A target and a drafter of torch."""

    model: TargetModel
    drafter: ModelDrafter | Eagle3Drafter

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    def target(self) -> TargetModel:
        return self.model

    def held(self, cache: TargetCache) -> tuple[int, ...]:
        return tuple(cache.prefix.tokens)

    def draft(self, sampling: SamplingParams) -> SessionDraft:
        return SessionDraft(self.drafter, sampling)
