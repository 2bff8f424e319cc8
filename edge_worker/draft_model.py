"""The draft model as the edge worker's model thread uses it, with lookup in front or alone.

Runs tokens, draws from what will be sent and looks between tokens whether it
should stop. Where lookup (`decoding.lookup`) has a proposal, the model is not asked; it catches up
in one run when it next speaks. Used from one thread; knows neither asyncio nor sessions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from bus.arrays import PROB_DTYPE, TOKEN_DTYPE, Float16Array, Int32Array
from bus.errors import LocalError
from decoding.lookup import Drafter, SuffixIndex
from decoding.sampling import SamplingParams, canonical, from_wire, warp
from decoding.uniforms import Purpose, uniform
from models.draft import LoadedDraft, load_draft
from models.padding import Padding
from models.prefixes import Prefix, PrefixCache
from models.probe import probe
from models.rowwise import exp_sum


@dataclass(slots=True)
class DraftCache:
    """One session's cache in the draft, and how its tokens are chosen.

    Attributes:
        text: what lookup searches, or None. Behind `length` it may hold what is no longer wanted.
        uses_model: whether anything is ever run.
    """

    prefix: Prefix
    sampling: SamplingParams
    text: SuffixIndex | None = None
    uses_model: bool = True

    @property
    def length(self) -> int:
        """Positions held: the next token run stands at this position."""
        return self.prefix.length if self.uses_model or self.text is None else len(self.text)

    def read(self, tokens: Sequence[int]) -> None:
        """Let lookup know the tokens at `length` and behind."""
        if self.text is not None:
            self.text.truncate(self.length)
            self.text.extend(tokens)

    def look_up(self) -> int | None:
        """Lookup's proposal for what follows, if it has one."""
        return None if self.text is None else self.text.propose()


@dataclass(frozen=True, slots=True)
class DraftedWindow:
    """What one call of `DraftModel.draft` produced; n may be smaller than asked, even 0.

    Attributes:
        start: absolute position of the first drafted token.
        num_cached: positions the cache holds now, at most all but the last token's.
        tokens: the n drafted tokens.
        q_ids: int32[n, K], the draft's most probable tokens at each position, in canonical order.
        q_probs: float16[n, K], their temperature-1 probabilities.
        draft_ms: wall time of the call.
    """

    start: int
    num_cached: int
    tokens: tuple[int, ...]
    q_ids: Int32Array
    q_probs: Float16Array
    draft_ms: float


class DraftModel:
    """A draft network with its tokenizer.

    Attributes:
        num_sparse: K, probabilities sent for each token, at most the head's size.
        weight_bytes: bytes of weights that one step reads.
        probe: what its passes compute here (`models.probe`).
        padding: makes steps last at least a set time, to measure as on another device.
        prefixes: lets sessions reuse what others have run; off until a worker replaces it.
        Others as in `models.loading.LoadedModel`.
    """

    def __init__(
        self, loaded: LoadedDraft, num_sparse: int = 48, drafter: Drafter = Drafter.MODEL
    ) -> None:
        if num_sparse < 1:
            raise LocalError(f"num_sparse is {num_sparse}; a draft sends at least one probability")
        self._network = loaded.network
        self.probe = probe(loaded.network, loaded.network.head_size, loaded.device)
        self._drafter = drafter
        self.tokenizer = loaded.tokenizer
        self.tokenizer_digest = loaded.tokenizer_digest
        self.name = loaded.name
        self.dtype = loaded.dtype
        self.device = loaded.device
        self.context_length = loaded.context_length
        self.vocab_size = loaded.vocab_size
        self.weight_bytes = loaded.network.weight_bytes
        self.num_sparse = min(num_sparse, loaded.network.head_size)
        self.padding = Padding()
        self.prefixes = PrefixCache()

    @classmethod
    def load(
        cls,
        spec: str,
        dtype: str = "auto",
        device: str = "auto",
        num_sparse: int = 48,
        drafter: Drafter = Drafter.MODEL,
    ) -> Self:
        """Load by spec; see `models.draft.load_draft` for specs and errors."""
        return cls(load_draft(spec, dtype, device), num_sparse, drafter)

    def open(self, sampling: SamplingParams, prompt: Sequence[int] = ()) -> DraftCache:
        """An empty cache for a new session.

        Args:
            prompt: what it will begin with; only `edge_worker.oracle` wants to know.
        """
        del prompt
        alone = self._drafter is Drafter.LOOKUP
        text = None if self._drafter is Drafter.MODEL else SuffixIndex(always=alone)
        return DraftCache(Prefix(), sampling, text, uses_model=not alone)

    def close(self, cache: DraftCache) -> None:
        """The session has ended: keep what it has run for others."""
        self.prefixes.keep(cache.prefix)

    def crop(self, cache: DraftCache, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            LocalError: the cache is shorter than that.
        """
        if cache.uses_model:
            cache.prefix.crop(length)
        elif cache.text is not None:
            cache.text.truncate(length)

    @torch.inference_mode()
    def prefill(self, cache: DraftCache, tokens: Sequence[int]) -> None:
        """Run tokens without drawing any, or copy what other sessions have run of them. The caller
        cuts long prompts into chunks."""
        cache.read(tokens)
        missing = self.prefixes.fill(cache.prefix, tokens, num_rows=0) if cache.uses_model else ()
        if missing:
            cache.prefix.run(self._network, missing, 1, self.device)

    def draft(
        self,
        cache: DraftCache,
        feed: Sequence[int],
        count: int,
        eos: frozenset[int],
        stop: Callable[[], bool],
    ) -> DraftedWindow:
        """Run `feed`, then draw up to `count` tokens, each run before the model draws the next.

        Fewer come out after a token of `eos`, or once `stop()` is true; it is asked before every
        token. With n > 0 tokens the cache then holds up to `start + n − 1` positions: the last
        drafted token is not run, nor are those since the model last spoke. With n = 0 it is
        unchanged.

        Args:
            feed: tokens the cache lacks before the first drafted one, never empty.
            count: how many to draw, at least 1.
        """
        if not feed or count < 1:
            raise LocalError(f"draft needs tokens to run and a count; got {len(feed)} and {count}")
        began = time.perf_counter()
        start = cache.length + len(feed)
        cache.read(feed)
        tokens: list[int] = []
        q_ids = np.empty((count, self.num_sparse), dtype=TOKEN_DTYPE)
        q_probs = np.zeros((count, self.num_sparse), dtype=PROB_DTYPE)
        width = 1 if cache.text is not None else self.num_sparse  # K entries if the model speaks
        pending = list(feed)
        for index in range(count):
            if stop():
                break
            found = cache.look_up()
            if found is None:
                step_began = time.perf_counter()
                logits = self._run(cache, pending)
                q_ids[index], q_probs[index] = self._proposal(logits, cache, start + index)
                token = _draw(q_ids[index], q_probs[index], cache.sampling, start + index)
                pending, width = [], self.num_sparse
                self.padding.wait(step_began)
            else:
                token = found
                q_ids[index], q_probs[index] = certain(token, self.num_sparse)
            tokens.append(token)
            pending.append(token)
            if cache.text is not None:
                cache.text.extend((token,))
            if token in eos:
                break
        if tokens and not cache.uses_model:
            self.crop(cache, start + len(tokens) - 1)
        return DraftedWindow(
            start, cache.length, tuple(tokens), q_ids[: len(tokens), :width],
            q_probs[: len(tokens), :width], 1e3 * (time.perf_counter() - began),
        )  # fmt: skip

    @torch.inference_mode()
    def _run(self, cache: DraftCache, tokens: Sequence[int]) -> Tensor:
        """Logits of the last of `tokens`, float[H]."""
        missing = self.prefixes.fill(cache.prefix, tokens, num_rows=1)
        return cache.prefix.run(self._network, missing, 1, self.device)[0]

    def _proposal(
        self, logits: Tensor, cache: DraftCache, position: int
    ) -> tuple[Int32Array, Float16Array]:
        """What is sent for `position`, and drawn from: int32[K] ids, float16[K] probabilities."""
        del cache, position
        return self._top_probabilities(logits)

    @torch.inference_mode()
    def _top_probabilities(self, logits: Tensor) -> tuple[Int32Array, Float16Array]:
        """The K most probable tokens in canonical order: int32[K] ids, float16[K] probabilities."""
        wide = logits.float()
        top, rows = torch.topk(wide, self.num_sparse)
        mass = float(exp_sum((wide - top[0])[None]))  # the same bits on any number of threads
        below = (top - top[0]).cpu().numpy().astype(np.float64)
        probs = (np.exp(below) / mass).astype(PROB_DTYPE)
        indices = rows.cpu().numpy()
        vocab = self._network.vocab
        return canonical(indices if vocab is None else vocab[indices], probs)


def certain(token: int, size: int) -> tuple[Int32Array, Float16Array]:
    """The one-hot distribution as `size` entries in canonical order: int32[K], float16[K]."""
    ids, probs = np.zeros(size, dtype=TOKEN_DTYPE), np.zeros(size, dtype=PROB_DTYPE)
    ids[0], probs[0] = token, 1.0
    ids[1:] = np.arange(size - 1)
    return ids, probs


def _draw(ids: Int32Array, probs: Float16Array, sampling: SamplingParams, position: int) -> int:
    """Draw from exactly what is sent."""
    q = warp(from_wire(ids, probs), sampling)
    if sampling.greedy:
        return q.argmax
    return q.draw(uniform(sampling.seed, position, Purpose.DRAFT))
