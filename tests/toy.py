"""Toy models for tests: any prefix has a fixed distribution, and the cache only counts tokens.

Both models really read their cache, so a wrong crop or feed changes the text and is seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from bus.arrays import Float16Array, Float64Array, Int32Array
from decoding.acceptance import TargetRow
from decoding.lookup import SuffixIndex
from decoding.sampling import (
    SamplingParams,
    canonical,
    draw_dense,
    from_wire,
    warp,
    warp_dense,
)
from decoding.uniforms import Purpose, uniform


@dataclass(frozen=True)
class ToyPair:
    """Two related next-token distributions over a tiny vocabulary.

    `agreement` in [0, 1] mixes the target's logits into the draft's; `num_sparse` is K; `lookup`
    is the least match with which lookup speaks in front of the draft, 0 for never.
    """

    vocab_size: int = 7
    agreement: float = 0.7
    seed: int = 0
    num_sparse: int = 4
    lookup: int = 0

    def target_logits(self, prefix: tuple[int, ...]) -> Float64Array:
        return self._noise(prefix, 1) * 2.0

    def draft_probs(self, prefix: tuple[int, ...]) -> tuple[Int32Array, Float16Array]:
        logits = self.agreement * self.target_logits(prefix) + (
            1 - self.agreement
        ) * 2.0 * self._noise(prefix, 2)
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        ids = np.argsort(-probs, kind="stable")[: self.num_sparse].astype(np.int32)
        return canonical(ids, probs[ids].astype(np.float16))

    def _noise(self, prefix: tuple[int, ...], which: int) -> Float64Array:
        return _noise(self.vocab_size, self.seed, which, prefix)


@lru_cache(maxsize=200_000)
def _noise(size: int, seed: int, which: int, prefix: tuple[int, ...]) -> Float64Array:
    """Normal numbers fixed by the arguments (Python hashes ints alike in every process)."""
    values = [hash((seed, which, i, prefix)) % 2**32 / 2**32 for i in range(size)]
    return 3.0 * (np.array(values) - 0.5)


@dataclass
class ToyDraft:
    """A draft with a cache of tokens, as `edge_worker.draft_model` has."""

    pair: ToyPair
    sampling: SamplingParams
    cache: tuple[int, ...] = ()

    def draft(
        self, feed: tuple[int, ...], count: int, eos: frozenset[int]
    ) -> tuple[int, tuple[int, ...], Int32Array, Float16Array]:
        assert feed, "a draft step needs something to run"
        text = SuffixIndex(max(self.pair.lookup, 1))
        text.extend(self.cache + feed)
        width = min(self.pair.num_sparse, self.pair.vocab_size)
        start, tokens = len(text), list[int]()
        ids, probs = list[Int32Array](), list[Float16Array]()
        while len(tokens) < count and not (tokens and tokens[-1] in eos):
            found = text.propose() if self.pair.lookup else None
            if found is None:
                self.cache, feed = self.cache + feed, ()
                row_ids, row_probs = self.pair.draft_probs(self.cache)
                q = warp(from_wire(row_ids, row_probs), self.sampling)
                found = q.draw(uniform(self.sampling.seed, len(self.cache), Purpose.DRAFT))
            else:
                row_ids = np.array([found, *range(width - 1)], np.int32)
                row_probs = np.eye(1, width, dtype=np.float16)[0]
            tokens.append(found)
            ids.append(row_ids)
            probs.append(row_probs)
            feed += (found,)
            text.extend((found,))
        return start, tuple(tokens), np.stack(ids), np.stack(probs)

    def crop(self, length: int) -> None:
        self.cache = self.cache[:length]


@dataclass
class ToyTarget:
    """A target with a cache of tokens, as `cloud_worker.target_model` has."""

    pair: ToyPair
    sampling: SamplingParams
    cache: tuple[int, ...] = ()
    rows: list[Float64Array] = field(default_factory=list)
    num_passes: int = 0

    def prefill(self, tokens: tuple[int, ...]) -> None:
        self.cache += tokens

    def forward(
        self, feed: tuple[int, ...], row_ids: tuple[Int32Array, ...]
    ) -> tuple[TargetRow, ...]:
        assert len(feed) >= len(row_ids)
        self.num_passes += 1
        logits = []
        for token in feed:
            self.cache += (token,)
            logits.append(self.pair.target_logits(self.cache))
        self.rows = logits[len(feed) - len(row_ids) :]
        return tuple(
            reduce_row(row, ids, self.sampling) for row, ids in zip(self.rows, row_ids, strict=True)
        )

    def full_row(self, index: int) -> Float64Array:
        return warp_dense(self.rows[index], self.sampling)

    def reduce_row(self, index: int, ids: Int32Array) -> TargetRow:
        return reduce_row(self.rows[index], ids, self.sampling)

    def crop(self, length: int) -> None:
        self.cache = self.cache[:length]


def reduce_row(logits: Float64Array, ids: Int32Array, sampling: SamplingParams) -> TargetRow:
    """The dense reference of what a target model's row reduction must give."""
    p1 = warp_dense(logits, SamplingParams(temperature=1.0))
    p = np.empty(0) if sampling.greedy else warp_dense(logits, sampling)[ids]
    return TargetRow(int(np.argmax(logits)), p1[ids], p, float(p1.max()))


def target_alone(
    pair: ToyPair,
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    max_new_tokens: int,
    eos: frozenset[int],
) -> tuple[int, ...]:
    """What the target writes by itself."""
    tokens = prompt
    for _ in range(max_new_tokens):
        u = uniform(sampling.seed, len(tokens), Purpose.TARGET)
        tokens += (draw_dense(warp_dense(pair.target_logits(tokens), sampling), u),)
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]
