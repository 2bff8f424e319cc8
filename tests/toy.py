"""Toy models for tests: any prefix has a fixed distribution, and the cache only counts tokens.

Both models really read their cache, so a wrong crop or feed changes the text and is seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from msgspec.structs import replace

from bus.protocol.arrays import Float16Array, Float64Array, Int32Array
from bus.protocol.errors import LocalError
from decoding.coupling import choose_sparse, noise
from decoding.engine import (
    NO_ROWS,
    Capabilities,
    ProposedTree,
    Segment,
    TargetRow,
    Want,
    no_speculator,
    require_speculator,
)
from decoding.rows import reduced
from decoding.sampling import (
    SamplingParams,
    canonical,
    from_wire,
    warp,
    warp_dense,
)
from decoding.uniforms import Purpose, uniform
from engines.lookup import SuffixIndex

Speculator = Callable[["ToyPair", tuple[int, ...], int], ProposedTree]
"""A toy speculator: pair, text, most tokens → a tree with rows."""


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
    speculator: Speculator | None = None

    def target(self) -> ToyTarget:
        return ToyTarget(self)

    def held(self, cache: ToyCache) -> tuple[int, ...]:
        """The tokens that a target's cache holds."""
        return cache.tokens

    def draft(self, sampling: SamplingParams) -> ToyDraft:
        return ToyDraft(self, sampling)

    def target_logits(self, prefix: tuple[int, ...]) -> Float64Array:
        return self._noise(prefix, 1) * 2.0

    def features(self, text: tuple[int, ...]) -> Float16Array:
        """float16[3, 2] of the text's last position; other texts have others."""
        return _noise(6, self.seed, 3, text).reshape(3, 2).astype(np.float16)

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
    """A draft with a cache of tokens, as an edge worker's drafter has."""

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
                seed, position = self.sampling.seed, len(self.cache)
                if self.sampling.choosing:
                    found = choose_sparse(q, seed, position)
                else:
                    found = q.draw(uniform(seed, position, Purpose.DRAFT))
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

    def learn(self, start: int, features: Float16Array) -> None:
        """Of no use to it."""


@dataclass
class ToyCache:
    """A session's tokens, the paths of a tree that has not been kept, and the last pass's rows with
    the texts before them."""

    sampling: SamplingParams
    tokens: tuple[int, ...] = ()
    branches: tuple[tuple[int, ...], ...] = ()
    rows: list[Float64Array] = field(default_factory=list)
    texts: list[tuple[int, ...]] = field(default_factory=list)
    speculator: str = ""


class ToyTarget:
    """A target that computes each row from the tokens its cache holds."""

    capabilities = Capabilities(
        trees=True, full_rows=True, hidden_states=False, batching=True, bitwise=True,
        number_formats=("float64",),
    )  # fmt: skip
    context_length = 4096
    speculators: tuple[str, ...] = ()

    def __init__(self, pair: ToyPair) -> None:
        self.pair = pair
        self.vocab_size = pair.vocab_size
        self.speculators = () if pair.speculator is None else ("medusa", "eagle3")

    def open(self, sampling: SamplingParams, speculator: str = "") -> ToyCache:
        require_speculator(self.speculators, speculator)
        return ToyCache(sampling, speculator=speculator)

    def propose(
        self, cache: ToyCache, feed: Sequence[int], most: int, rows: bool = False
    ) -> ProposedTree:
        if not cache.speculator or self.pair.speculator is None:
            raise no_speculator()
        if not feed or most < 1:
            raise LocalError("a speculator reads at least one token and proposes at least one")
        assert not cache.branches, "a tree is kept or dropped before the next is proposed"
        text = (*cache.tokens, *feed)
        tree = self.pair.speculator(self.pair, text, most)
        return tree if rows else replace(tree, q_ids=NO_ROWS[0], q_probs=NO_ROWS[1])

    def length(self, cache: ToyCache) -> int:
        return len(cache.tokens) + len(cache.branches)

    def run(self, batch: Sequence[Segment[ToyCache]]) -> list[list[TargetRow]]:
        for segment in batch:
            segment.check()
        return [self._run(segment) for segment in batch]

    def _run(self, segment: Segment[ToyCache]) -> list[TargetRow]:
        cache, texts = segment.cache, list[tuple[int, ...]]()
        parents = segment.parents or range(-1, len(segment.tokens) - 1)
        for token, parent in zip(segment.tokens, parents, strict=True):
            texts.append((*(texts[parent] if parent >= 0 else cache.tokens), token))
        rows = [self.pair.target_logits(texts[want.index]) for want in segment.wants]
        before = [texts[want.index] for want in segment.wants]
        cache.rows = cache.rows + rows if segment.continues else rows
        cache.texts = cache.texts + before if segment.continues else before
        if segment.parents:
            cache.branches = tuple(texts)
        else:
            cache.tokens = texts[-1]
        return [
            self._reduced(row, want, cache, text)
            for row, want, text in zip(rows, segment.wants, before, strict=True)
        ]

    def row(self, cache: ToyCache, index: int, want: Want) -> TargetRow:
        if not 0 <= index < len(cache.rows):
            raise LocalError("the last pass left no such row")
        text = cache.texts[index] if want.features else ()
        return self._reduced(cache.rows[index], want, cache, text)

    def _reduced(
        self, logits: Float64Array, want: Want, cache: ToyCache, text: tuple[int, ...]
    ) -> TargetRow:
        row = reduced(logits, want, cache.sampling)
        return replace(row, features=self.pair.features(text)) if want.features else row

    def keep(self, cache: ToyCache, length: int, path: Sequence[int] = ()) -> None:
        if not 0 <= length <= self.length(cache):
            raise LocalError(f"cannot keep {length} positions of {self.length(cache)}")
        if path:
            texts = [cache.branches[node] for node in path]
            longer = [cache.tokens, *texts]
            if length != len(cache.tokens) or any(
                after[:-1] != before for before, after in itertools.pairwise(longer)
            ):
                raise LocalError(f"{list(path)} is no path of the tree after position {length}")
            cache.tokens = texts[-1]
        else:
            cache.tokens = cache.tokens[:length]
        cache.branches = ()

    def close(self, cache: ToyCache) -> None:
        cache.tokens = cache.branches = ()


def likely_tree(pair: ToyPair, text: tuple[int, ...], most: int) -> ProposedTree:
    """The most probable paths of the pair's draft, as EAGLE grows them: the likelier its errors,
    the lower the pair's agreement."""
    nodes: list[tuple[float, int, int, tuple[Int32Array, Float16Array]]] = []
    texts: list[tuple[int, ...]] = []
    open_nodes = [(1.0, -1, text)]
    leaves: list[tuple[float, int, int, tuple[Int32Array, Float16Array]]] = []
    while len(nodes) < most:
        for prob, node, prefix in open_nodes:
            row = pair.draft_probs(prefix)
            q1 = from_wire(*row)
            leaves += [
                (prob * float(p), node, int(t), row) for t, p in zip(q1.ids, q1.probs, strict=True)
            ]
        best = max(leaves, key=lambda leaf: leaf[0])
        leaves.remove(best)
        nodes.append(best)
        texts.append((*(texts[best[1]] if best[1] >= 0 else text), best[2]))
        open_nodes = [(best[0], len(nodes) - 1, texts[-1])]
    return ProposedTree(
        tuple(token for _, _, token, _ in nodes),
        tuple(parent for _, parent, _, _ in nodes),
        np.stack([row[0] for _, _, _, row in nodes]),
        np.stack([row[1] for _, _, _, row in nodes]),
    )


def nonsense(seed: int) -> Speculator:
    """Proposes trees of any shape and size, with any tokens, siblings twice."""

    def propose(pair: ToyPair, text: tuple[int, ...], most: int) -> ProposedTree:
        def number(below: int, *which: int) -> int:
            return int(hash((seed, text, *which)) % 2**32) % below

        size = number(most + 1)
        ids = np.arange(pair.vocab_size, dtype=np.int32)
        even = np.full((size, pair.vocab_size), 1 / pair.vocab_size, np.float16)
        return ProposedTree(
            tuple(number(pair.vocab_size, 1, node) for node in range(size)),
            tuple(number(node + 1, 2, node) - 1 for node in range(size)),
            np.tile(ids, (size, 1)),
            even,
        )

    return propose


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
        logits = pair.target_logits(tokens)
        if sampling.greedy:
            tokens += (int(np.argmax(logits)),)
        else:
            scores = np.log(np.maximum(warp_dense(logits, sampling), 1e-300))
            scores -= np.log(-np.log(noise(sampling.seed, len(tokens), logits.size)))
            tokens += (int(np.argmax(scores)),)
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]
