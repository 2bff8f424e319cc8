"""A target without a model: it knows its answer, by position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from decoding.engine import (
    Capabilities,
    ProposedTree,
    Segment,
    TargetRow,
    Want,
    no_speculator,
    require_speculator,
)
from decoding.sampling import SamplingParams

VOCAB_SIZE, CONTEXT_LENGTH = 1 << 16, 1 << 20
_EMPTY = np.empty(0)


@dataclass(slots=True)
class Positions:
    """A session's cache in the simulated target: how long it is, and where its last rows are."""

    length: int = 0
    rows: list[int] = field(default_factory=list)


class KnownTarget:
    """A target that only knows its answer, by position."""

    capabilities = Capabilities(
        trees=False, full_rows=False, hidden_states=False, batching=False, bitwise=True,
        number_formats=(),
    )  # fmt: skip
    vocab_size = VOCAB_SIZE
    context_length = CONTEXT_LENGTH
    speculators: tuple[str, ...] = ()

    def __init__(self, token_at: Callable[[int], int]) -> None:
        self._token_at = token_at

    def open(self, sampling: SamplingParams, speculator: str = "") -> Positions:
        del sampling
        require_speculator(self.speculators, speculator)
        return Positions()

    def propose(
        self, cache: Positions, feed: Sequence[int], most: int, rows: bool = False
    ) -> ProposedTree:
        del cache, feed, most, rows
        raise no_speculator()

    def length(self, cache: Positions) -> int:
        return cache.length

    def run(self, batch: Sequence[Segment[Positions]]) -> list[list[TargetRow]]:
        return [self._run(segment) for segment in batch]

    def _run(self, segment: Segment[Positions]) -> list[TargetRow]:
        cache = segment.cache
        cache.rows = [cache.length + want.index + 1 for want in segment.wants]
        cache.length += len(segment.tokens)
        return [self._at(position) for position in cache.rows]

    def row(self, cache: Positions, index: int, want: Want) -> TargetRow:
        del want
        return self._at(cache.rows[index])

    def keep(self, cache: Positions, length: int, path: Sequence[int] = ()) -> None:
        cache.length = length + len(path)

    def close(self, cache: Positions) -> None:
        cache.length = 0

    def _at(self, position: int) -> TargetRow:
        return TargetRow(self._token_at(position), _EMPTY, _EMPTY, 1.0)
