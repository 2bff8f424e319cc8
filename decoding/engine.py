"""The seam between the algorithm and what runs models: a `Target` verifies, a `Drafter` drafts.

A target keeps one cache for each session. `Target.run` takes a *batch*: segments of tokens of
several sessions, each a chain after what its cache holds, or a tree of alternatives. A token's
*row* is the distribution of the token after it, given its cache and its ancestors; it comes back
reduced to what was asked for. `Target.keep` then forgets what was rejected.

    cache = target.open(sampling)
    target.run([Segment(cache, prompt[:-1])])                       # prefill: no rows
    [[row, after]] = target.run([Segment(cache, (last, drafted), wants=(Want(0), Want(1)))])
    target.keep(cache, len(prompt))                                 # the drafted token is rejected

Engines live in `engines/`; `tests/engines/conformance.py` says what each must do. This module
knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

import numpy as np
from msgspec import Struct

from bus.protocol.arrays import TOKEN_DTYPE, Float16Array, Float32Array, Float64Array, Int32Array
from bus.protocol.errors import LocalError
from decoding.sampling import SamplingParams

NO_IDS: Int32Array = np.empty(0, TOKEN_DTYPE)
NO_PROBS: Float64Array = np.empty(0)
NUM_TOP = 20
"""Most log-probabilities of a row [OpenAI's API offers as many]."""

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
        full_rows, hidden_states: of a row on request.
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
    """

    ranked_head: bool = False


class Want(Struct, frozen=True):
    """A row that is asked for, and what of it.

    Attributes:
        index: of the token in its segment; the row is the distribution after it.
        ids: int32[K], tokens whose probabilities are wanted.
        choice_at: absolute position of the row's token, where the target's own choice under the
            session's sampling and seed is wanted; None: not wanted.
        gap: give the lead of the first logit over the second.
        top: give the `NUM_TOP` most probable tokens. full: give the whole warped distribution.
        hidden: give the hidden state after the last norm.
    """

    index: int
    ids: Int32Array = NO_IDS
    choice_at: int | None = None
    gap: bool = False
    top: bool = False
    full: bool = False
    hidden: bool = False


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
        gap, choice, top, full, hidden: None where not wanted. `top` is (ids int32[n], temperature-1
            log-probabilities float64[n]), falling, then by id; `full` float64[V], warped; `hidden`
            float32[hidden].
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
        if self.parents and (
            len(self.parents) != size
            or not all(-1 <= parent < index for index, parent in enumerate(self.parents))
        ):
            raise LocalError(
                f"parents {list(self.parents)} do not make a tree of {size} tokens; expected for "
                "each token the index of an earlier one, or -1"
            )


class Target(Protocol[Cache]):
    """A model that verifies. Called from one thread.

    Attributes:
        capabilities: what it can do.
        vocab_size: V, number of real tokens. context_length: most positions of a session.
    """

    capabilities: Capabilities
    vocab_size: int
    context_length: int

    def open(self, sampling: SamplingParams) -> Cache:
        """An empty cache for a new session."""
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
