"""A pass over several sessions, as networks take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.torch.cache import KVCache


@dataclass(frozen=True, slots=True)
class Part:
    """One session's tokens in a pass.

    Attributes:
        tokens: at least one. cache: that they are appended to; a pass holds each cache once.
        parents: for a tree, each token's parent among them, −1 for the end of the cache; empty for
            a chain.
        wanted: rising indices of the tokens whose rows are wanted.
    """

    tokens: Sequence[int]
    cache: KVCache
    parents: Sequence[int] = ()
    wanted: Sequence[int] = ()

    @classmethod
    def of(cls, tokens: Sequence[int], cache: KVCache, num_rows: int) -> Part:
        """A chain of which the last `num_rows` rows are wanted."""
        return cls(tokens, cache, wanted=range(len(tokens) - num_rows, len(tokens)))

    @property
    def size(self) -> int:
        return len(self.tokens)

    def positions(self) -> list[int]:
        """Each token's position in its text."""
        past = self.cache.length
        if not self.parents:
            return list(range(past, past + self.size))
        positions: list[int] = []
        for parent in self.parents:
            positions.append(past if parent < 0 else positions[parent] + 1)
        return positions


def input_ids(parts: Sequence[Part], device: torch.device) -> Tensor:
    """int64[n], the tokens of all parts."""
    tokens = [token for part in parts for token in part.tokens]
    return torch.tensor(tokens, dtype=torch.long, device=device)


def wanted_rows(parts: Sequence[Part]) -> list[int]:
    """Where the wanted rows are among the rows of all parts."""
    rows, first = list[int](), 0
    for part in parts:
        rows += [first + index for index in part.wanted]
        first += part.size
    return rows
