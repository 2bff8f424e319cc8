"""The prefix cache: keys and values of finished sessions, so that a prompt is not run again.

A session's cache is a `Prefix`: tokens, with their keys and values. When the session ends, the
`PrefixCache` of its model takes the prefix over without copying it. A session that opens with the
same tokens gets a copy of as many positions as agree, and runs the rest. It may copy from a session
that is still open, too: two sessions of one prompt share its prefill even where they run at once.

What is copied is what a pass over the same tokens would write. In int8 on a CPU it is the same bit
for bit, as passes do not depend on how tokens are cut into them; in other formats it differs in
last bits, as between any two ways of cutting. A prefix cache belongs to one loaded model, so
nothing crosses weights or number formats.

All methods run on the model thread, the only one that touches caches: there are no locks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakSet

from torch import Tensor

from decoding.common import common_length
from engines.torch.cache import KVCache
from engines.torch.parts import Part

MIN_REUSED = 16
"""Fewer positions are not worth a search and a copy: the pass that runs anyway takes them along."""


class Network(Protocol):
    """What runs a prefix's tokens."""

    def run(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
        """As `engines.torch.network.Network.run`."""
        ...


@dataclass(eq=False, slots=True, weakref_slot=True)
class Prefix:
    """Tokens that have run, with their keys and values.

    Attributes:
        tokens: the token at each position held, but for those of a tree.
        branches: tokens of a tree that was run last, until `keep`.
        num_reused: positions copied from other prefixes.
        is_opening: no row has been asked for yet. Only then are positions copied: a session whose
            text goes on as another's did still runs, and times, each of its passes.
        is_whole: no pass has failed, so that `tokens` describes all that is held.
    """

    keys_values: KVCache = field(default_factory=KVCache)
    tokens: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    num_reused: int = 0
    is_opening: bool = True
    is_whole: bool = True

    @property
    def length(self) -> int:
        """Positions held: the next token runs at this position."""
        return self.keys_values.length

    def keep(self, length: int, path: Sequence[int] = ()) -> None:
        """As `KVCache.keep`."""
        self.keys_values.keep(length, path)
        branch = [self.branches[index] for index in path] if self.branches else self.tokens[length:]
        self.tokens[length:] = branch[: len(path)]
        self.branches = []
        self.is_whole = self.length == len(self.tokens)

    def run(self, network: Network, tokens: Sequence[int], num_rows: int) -> Tensor:
        """Run tokens after those held; float[num_rows, V] logits of the last of them."""
        with self.running(tokens):
            return network.run([Part.of(tokens, self.keys_values, num_rows)])[0]

    @contextlib.contextmanager
    def running(self, tokens: Sequence[int], parents: Sequence[int] = ()) -> Iterator[None]:
        """While a pass appends tokens. Those of a tree count once a path of it is kept."""
        was_whole, self.is_whole = self.is_whole, False
        yield
        if parents:
            self.branches = list(tokens)
        else:
            self.tokens += tokens
        self.is_whole = was_whole


class PrefixCache:
    """Prefixes of one model's sessions, the least recently used dropped first.

    Args:
        max_mb: most MiB that prefixes of finished sessions hold together, on the model's device;
            0 keeps none and copies nothing. Open sessions hold theirs in any case.

    Attributes:
        num_bytes: memory that the kept prefixes reserve.
        num_hits: sessions that reused positions. num_tokens: positions they reused, of
            num_queried that were looked for.
    """

    def __init__(self, max_mb: int = 0) -> None:
        self._max_bytes = max_mb << 20
        self._kept: list[Prefix] = []  # the least recently used first
        self._open: WeakSet[Prefix] = WeakSet()
        self.num_bytes = 0
        self.num_hits = 0
        self.num_tokens = 0
        self.num_queried = 0

    def __len__(self) -> int:
        """Prefixes of finished sessions."""
        return len(self._kept)

    def fill(self, prefix: Prefix, tokens: Sequence[int], num_rows: int) -> Sequence[int]:
        """Append to `prefix` what others hold of the `tokens` that follow it.

        Args:
            num_rows: rows of logits asked for; as many of the last tokens are left to run.

        Returns:
            The tokens that are left to run. With `num_rows` 0 there may be none.
        """
        if not self._max_bytes or not prefix.is_opening or not prefix.is_whole:
            return tokens
        self._open.add(prefix)
        prefix.is_opening = num_rows == 0
        self.num_queried += len(tokens)
        held, most = prefix.length, len(tokens) - num_rows
        if most < MIN_REUSED:
            return tokens
        source, length = self._longest(prefix, [*prefix.tokens, *tokens[:most]])
        if source is None or length < held + MIN_REUSED:
            return tokens
        prefix.keys_values.append(source.keys_values, length)
        prefix.tokens += tokens[: length - held]
        self.num_hits += prefix.num_reused == 0
        self.num_tokens += length - held
        prefix.num_reused += length - held
        self._touch(source)
        return tokens[length - held :]

    def keep(self, prefix: Prefix) -> None:
        """Take over the prefix of a session that has ended, which is empty afterwards."""
        self._open.discard(prefix)
        if prefix.branches:
            prefix.keep(len(prefix.tokens))
        kept = Prefix(prefix.keys_values, prefix.tokens)
        prefix.keys_values, prefix.tokens = KVCache(), []
        size = kept.keys_values.num_bytes
        if not prefix.is_whole or kept.length < MIN_REUSED or size > self._max_bytes:
            return
        for other in list(self._kept):
            common = common_length(other.tokens, kept.tokens)
            if other.length <= kept.length and other.length - common < MIN_REUSED:
                self._drop(other)
            elif kept.length - common < MIN_REUSED:
                self._touch(other)
                return
        self._kept.append(kept)
        self.num_bytes += size
        while self.num_bytes > self._max_bytes:
            self._drop(self._kept[0])

    def counters(self) -> dict[str, int]:
        """For a worker's record; may be read from any thread. Empty where nothing is kept."""
        if not self._max_bytes:
            return {}
        return {
            "prefix_cache_entries": len(self._kept),
            "prefix_cache_mb": -(-self.num_bytes >> 20),
            "prefix_cache_hits_total": self.num_hits,
            "prefix_cache_tokens_total": self.num_tokens,
        }

    def _longest(self, prefix: Prefix, tokens: list[int]) -> tuple[Prefix | None, int]:
        """The other prefix that agrees longest with `tokens`, and how long."""
        best, length = None, 0
        for other in (*self._kept, *self._open):
            if other is not prefix and other.is_whole:
                common = common_length(other.tokens, tokens)
                if common > length:
                    best, length = other, common
        return best, length

    def _touch(self, prefix: Prefix) -> None:
        """Make a kept prefix the most recently used one."""
        if prefix in self._kept:
            self._kept.remove(prefix)
            self._kept.append(prefix)

    def _drop(self, prefix: Prefix) -> None:
        self._kept.remove(prefix)
        self.num_bytes -= prefix.keys_values.num_bytes
