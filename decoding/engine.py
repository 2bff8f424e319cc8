"""The seam between the algorithm and what runs models: a `Target` verifies, a `Drafter` drafts.

A target keeps one cache for each session. `Target.run` takes a *batch*: segments of tokens of
several sessions, each a chain after what its cache holds, or a tree of alternatives. A token's
*row* is the distribution of the token after it, given its cache and its ancestors; it comes back
reduced to what was asked for. `Target.keep` then forgets what was rejected.

    cache = target.open(sampling)
    target.run([Segment(cache, prompt[:-1])])                       # prefill: no rows
    [[row, after]] = target.run([Segment(cache, (last, drafted), wants=(Want(0), Want(1)))])
    target.keep(cache, len(prompt))                                 # the drafted token is rejected

A target may have a *speculator*: weights beside it that read its hidden states and propose a tree
of tokens after the text (`Target.propose`), which the next pass runs.

Engines live in `engines/`; `tests/engines/conformance.py` says what each must do. This module
knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

import numpy as np
from msgspec import Struct

from bus.protocol.arrays import (
    PROB_DTYPE,
    TOKEN_DTYPE,
    Float16Array,
    Float32Array,
    Float64Array,
    Int32Array,
)
from bus.protocol.bounds import MAX_LOGPROBS
from bus.protocol.errors import LocalError
from bus.protocol.messages import TokenRows
from decoding.sampling import SamplingParams

NO_IDS: Int32Array = np.empty(0, TOKEN_DTYPE)
NO_PROBS: Float64Array = np.empty(0)
NO_ROWS = np.empty((0, 0), TOKEN_DTYPE), np.empty((0, 0), PROB_DTYPE)
"""`ProposedTree.q_ids` and `q_probs` of no tokens."""
NUM_TOP = MAX_LOGPROBS
"""Most log-probabilities of a row."""

Cache = TypeVar("Cache")


class Coupling(StrEnum):
    """How an engine's own choice above temperature 0 depends on the seed.

    `GUMBEL`: argmax of log p + noise of (seed, position, token id), as `decoding.coupling`: the
    same seed gives the same text on every engine. `OWN`: the engine samples by itself: identical
    at temperature 0, exact in distribution above.
    """

    GUMBEL = "gumbel"
    OWN = "own"


class Capabilities(Struct, frozen=True):
    """What an engine can do; a method that needs more is refused at start.

    Attributes:
        trees: segments may be trees. batching: a batch of several segments costs less than one
            after the other.
        full_rows, hidden_states: of a row on request, the latter as `hidden` and `features`.
        bitwise: a row has the same bits however tokens are cut into passes and batches.
        number_formats: that its models run in.
    """

    trees: bool
    full_rows: bool
    hidden_states: bool
    batching: bool
    bitwise: bool
    number_formats: tuple[str, ...]
    coupling: Coupling = Coupling.GUMBEL


class DrafterCapabilities(Struct, frozen=True):
    """What a drafter can do; a method that needs more is refused by the edge at start.

    Attributes:
        ranked_head: it writes only tokens of a ranking, the most frequent ones of the vocabulary,
            which makes a step cheaper.
        features: it reads the target's features (`FeatureDrafter`), and writes nothing without.
    """

    ranked_head: bool = False
    features: bool = False


class Want(Struct, frozen=True):
    """A row that is asked for, and what of it.

    Attributes:
        index: of the token in its segment; the row is the distribution after it.
        ids: int32[K], tokens whose probabilities are wanted.
        choice_at: absolute position of the row's token, where the target's own choice under the
            session's sampling and seed is wanted; None: not wanted.
        gap: give the lead of the first logit over the second.
        entropy: give the entropy of the temperature-1 distribution.
        top: give the `NUM_TOP` most probable tokens, and the log-probabilities of the choice and of
            the tokens in `scored`. full: give the whole warped distribution.
        hidden: give the hidden state after the last norm. features: give those of three layers.
    """

    index: int
    ids: Int32Array = NO_IDS
    choice_at: int | None = None
    gap: bool = False
    top: bool = False
    full: bool = False
    hidden: bool = False
    entropy: bool = False
    features: bool = False
    scored: tuple[int, ...] = ()


class Choice(Struct, frozen=True):
    """The target's own next token, and by how much it won: the difference of logits at
    temperature 0, of (log p + noise) above."""

    token: int
    gap: float


class TargetRow(Struct, frozen=True):
    """The target's next-token distribution at one position, reduced.

    Attributes:
        argmax: the most probable token; of equals the lowest id.
        p1_at_q: float64[K], temperature-1 probabilities at the wanted ids.
        p_at_q: float64[K], the same under the session's temperature, top-k and top-p; 0 for tokens
            cut off. At temperature 0 it is not needed and empty.
        p1_max: temperature-1 probability of the argmax.
        log_sum_exp: of the logits, in nats.
        gap, choice, top, full, hidden, entropy, features: None where not wanted. `top` is (ids
            int32[n], temperature-1 log-probabilities float64[n]), falling, then by id; `scored` are
            pairs of a token and its log-probability there, those asked for and the choice; `full`
            float64[V], warped; `hidden` float32[hidden]; `entropy` −Σ p₁ ln p₁ in nats; `features`
            float16[3, hidden], the residual streams x of the position after a low, a middle and a
            high layer, x / √(mean x²), in the model's own basis.
    """

    argmax: int
    p1_at_q: Float64Array
    p_at_q: Float64Array
    p1_max: float
    log_sum_exp: float = 0.0
    gap: float | None = None
    choice: Choice | None = None
    top: tuple[Int32Array, Float64Array] | None = None
    full: Float64Array | None = None
    hidden: Float32Array | None = None
    entropy: float | None = None
    features: Float16Array | None = None
    scored: tuple[tuple[int, float], ...] = ()


class Segment(Struct, Generic[Cache], frozen=True):
    """Tokens of one session in a pass.

    Attributes:
        cache: of the session; a batch holds each cache once.
        tokens: at least one.
        wants: rows to give, by rising index.
        parents: for a tree, each token's parent: an index before its own, or −1 for the end of the
            cache. Empty for a chain.
        continues: the rows are counted on from those of the pass before (`Target.row`).
    """

    cache: Cache
    tokens: tuple[int, ...]
    wants: tuple[Want, ...] = ()
    parents: tuple[int, ...] = ()
    continues: bool = False

    def check(self) -> None:
        """Raises LocalError where it is none."""
        size = len(self.tokens)
        indices = [want.index for want in self.wants]
        if not size:
            raise LocalError("a segment needs at least one token")
        if indices != sorted(set(indices)) or not all(0 <= index < size for index in indices):
            raise LocalError(
                f"rows {indices} were asked for of a segment of {size} tokens; expected rising "
                f"indices in 0 … {size - 1}"
            )
        if self.parents and not _is_tree(self.parents, size):
            raise LocalError(
                f"parents {list(self.parents)} do not make a tree of {size} tokens; expected for "
                "each token the index of an earlier one, or -1"
            )


def _is_tree(parents: Sequence[int], size: int) -> bool:
    rising = all(-1 <= parent < index for index, parent in enumerate(parents))
    return len(parents) == size and rising


class ProposedTree(Struct, frozen=True):
    """What a speculator proposes after the text.

    Attributes:
        tokens: n candidates, maybe none.
        parents: of each the index of an earlier one, or −1 where it follows the text. Siblings come
            in falling order of the speculator's probability.
        q_ids: int32[n, K]. q_probs: float16[n, K]: for each token the most probable ones of the
            speculator's temperature-1 distribution that it was taken from, itself among them, in
            canonical order (`decoding.sampling`); n × 0 unless asked for.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    q_ids: Int32Array
    q_probs: Float16Array

    def check(self, vocab_size: int, most: int, rows: bool = False) -> None:
        """Raises LocalError where it is not a tree of at most `most` tokens below `vocab_size`,
        with a row for each token if `rows`."""
        size = len(self.tokens)
        if size > most or not _is_tree(self.parents, size):
            raise LocalError(
                f"the speculator proposed {size} tokens with parents {list(self.parents)}; "
                f"expected at most {most}, for each the index of an earlier one, or -1"
            )
        if not all(0 <= token < vocab_size for token in self.tokens):
            raise LocalError(
                f"the speculator proposed tokens {list(self.tokens)}; expected ids in "
                f"0 … {vocab_size - 1}"
            )
        if rows and size:
            self._check_rows(vocab_size)

    def _check_rows(self, vocab_size: int) -> None:
        size = len(self.tokens)
        ids, probs = self.q_ids, self.q_probs
        shaped = ids.ndim == 2 and ids.shape == probs.shape and len(ids) == size and ids.size > 0
        if not shaped or ids.dtype != TOKEN_DTYPE or probs.dtype != PROB_DTYPE:
            raise LocalError(
                f"the speculator gave rows {ids.dtype}{ids.shape} and {probs.dtype}{probs.shape} "
                f"for {size} tokens; expected int32 and float16 of [{size}, K]"
            )
        try:
            TokenRows(ids.tobytes(), probs.tobytes()).check(size)
        except ValueError as error:
            raise LocalError(f"the speculator gave a row that is not canonical: {error}") from None
        has_token = (ids == np.array(self.tokens)[:, None]).any(axis=1).all()
        if not (has_token and (ids >= 0).all() and (ids < vocab_size).all()):
            raise LocalError(
                f"a row of the speculator lacks its own token, or has an id outside 0 … "
                f"{vocab_size - 1}"
            )


class Target(Protocol[Cache]):
    """A model that verifies. Called from one thread.

    Attributes:
        capabilities: what it can do.
        vocab_size: V, number of real tokens. context_length: most positions of a session.
        speculators: kinds it can propose by, as `Method.speculator` names them; () for none.
    """

    capabilities: Capabilities
    vocab_size: int
    context_length: int
    speculators: tuple[str, ...]

    def open(self, sampling: SamplingParams, speculator: str = "") -> Cache:
        """An empty cache for a new session, which proposes by a speculator unless that is empty.

        Raises:
            LocalError: there is no such speculator (`require_speculator`).
        """
        ...

    def length(self, cache: Cache) -> int:
        """Positions held; those of a tree that has not been kept count as well."""
        ...

    def run(self, batch: Sequence[Segment[Cache]]) -> list[list[TargetRow]]:
        """Run the segments in one pass and append them to their caches; the rows wanted of each.

        Raises:
            LocalError: a segment that is none, or a tree where the engine has no trees.
        """
        ...

    def propose(
        self, cache: Cache, feed: Sequence[int], most: int, rows: bool = False
    ) -> ProposedTree:
        """A tree of tokens after the text, which is what the cache holds and `feed`.

        It runs nothing of the target and changes nothing that `run`, `row` and `keep` see. What it
        proposes need not be the same on another machine: the target's rows decide.

        Args:
            feed: tokens of the text that the cache does not hold yet, at least one; usually its
                last one alone.
            most: tokens, at least one. rows: give `q_ids` and `q_probs`.

        Raises:
            LocalError: nothing to read, `most` below 1, or a cache without a speculator.
        """
        ...

    def row(self, cache: Cache, index: int, want: Want) -> TargetRow:
        """Row `index` of those that the cache's last pass gave, again, reduced to `want` (whose own
        index does not matter).

        Raises:
            LocalError: there is no such row.
        """
        ...

    def keep(self, cache: Cache, length: int, path: Sequence[int] = ()) -> None:
        """Forget every position from `length` on, but for a path of the tree that began there.

        Args:
            path: indices of the tree's tokens, each the parent of the next.

        Raises:
            LocalError: fewer positions are held.
        """
        ...

    def close(self, cache: Cache) -> None:
        """The session has ended."""
        ...


def require_speculator(speculators: Sequence[str], speculator: str) -> None:
    """Raises LocalError where a target has not the speculator that a session is opened with; empty
    is none at all."""
    if speculator and speculator not in speculators:
        known = ", ".join(speculators) or "none"
        raise LocalError(f"this target has no speculator {speculator!r}; it has {known}")


def no_speculator() -> LocalError:
    """What `Target.propose` raises for a cache that was opened without a speculator."""
    return LocalError("this session was opened without a speculator; it proposes nothing")


class DraftedWindow(Struct, frozen=True):
    """What a drafter has written, and with which probabilities.

    Attributes:
        start: absolute position of the first token.
        num_cached: positions the drafter has read and run; the last drafted token is not.
        tokens: none where the drafter has nothing to say.
        q_ids: int32[n, K]. q_probs: float16[n, K], as they travel (`decoding.sampling`).
        draft_ms: time taken.
    """

    start: int
    num_cached: int
    tokens: tuple[int, ...]
    q_ids: Int32Array
    q_probs: Float16Array
    draft_ms: float


class Drafter(Protocol[Cache]):
    """Writes ahead. Called from one thread; several may stand in a row (`engines.row`).

    Attributes:
        capabilities: what it can do.
        vocab_size: number of real tokens. context_length: most positions it reads.
    """

    capabilities: DrafterCapabilities
    vocab_size: int
    context_length: int

    def open(self, sampling: SamplingParams, prompt: Sequence[int] = ()) -> Cache:
        """An empty cache for a new session, which will begin with `prompt`."""
        ...

    def length(self, cache: Cache) -> int:
        """Positions read."""
        ...

    def prefill(self, cache: Cache, tokens: Sequence[int]) -> None:
        """Read tokens without drafting."""
        ...

    def draft(
        self,
        cache: Cache,
        feed: Sequence[int],
        count: int,
        eos: frozenset[int],
        stop: Callable[[], bool],
    ) -> DraftedWindow:
        """Read `feed`, then write up to `count` tokens.

        Fewer come out after a token of `eos`, once `stop()` is true (it is asked before every
        token), or where the drafter has nothing to say. With n > 0 tokens the cache then holds
        `start + n − 1` positions; with n = 0 it has read `feed` or nothing of it.

        Raises:
            LocalError: nothing to read, or a count below 1.
        """
        ...

    def keep(self, cache: Cache, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            LocalError: fewer positions are held.
        """
        ...

    def close(self, cache: Cache) -> None:
        """The session has ended."""
        ...


class FeatureDrafter(Drafter[Cache], Protocol[Cache]):
    """One that has `DrafterCapabilities.features`."""

    def learn(self, cache: Cache, start: int, features: Float16Array) -> None:
        """The target's features, float16[n, 3, hidden] (`TargetRow.features`), of the absolute
        positions from `start` on. They are final, as are the text's tokens up to start + n; the
        cache may not have read all of these yet, and what it reads again is the same.

        Raises:
            LocalError: features of another target.
        """
        ...
