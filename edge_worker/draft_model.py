"""The draft model as the edge worker's model thread uses it.

Runs tokens, draws from what will be sent (DESIGN rule 1) and looks between tokens whether it
should stop. Used from one thread; knows neither asyncio nor sessions.
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
from decoding.sampling import SamplingParams, canonical, from_wire, warp
from decoding.uniforms import Purpose, uniform
from models.cache import KVCache
from models.draft import LoadedDraft, load_draft


@dataclass(slots=True)
class DraftCache:
    """One session's cache in the draft, and how its tokens are chosen."""

    keys_values: KVCache
    sampling: SamplingParams

    @property
    def length(self) -> int:
        """Positions held: the next token run stands at this position."""
        return self.keys_values.length


@dataclass(frozen=True, slots=True)
class DraftedWindow:
    """What one call of `DraftModel.draft` produced; n may be smaller than asked, even 0.

    Attributes:
        start: absolute position of the first drafted token.
        tokens: the n drafted tokens.
        q_ids: int32[n, K], the draft's most probable tokens at each position, in canonical order.
        q_probs: float16[n, K], their temperature-1 probabilities.
        draft_ms: wall time of the call.
    """

    start: int
    tokens: tuple[int, ...]
    q_ids: Int32Array
    q_probs: Float16Array
    draft_ms: float


class DraftModel:
    """A draft network with its tokenizer.

    Attributes:
        num_sparse: K, probabilities sent for each token, at most the head's size.
        weight_bytes: bytes of weights that one step reads.
        Others as in `models.loading.LoadedModel`.
    """

    def __init__(self, loaded: LoadedDraft, num_sparse: int = 48) -> None:
        if num_sparse < 1:
            raise LocalError(f"num_sparse is {num_sparse}; a draft sends at least one probability")
        self._network = loaded.network
        self.tokenizer = loaded.tokenizer
        self.tokenizer_digest = loaded.tokenizer_digest
        self.name = loaded.name
        self.dtype = loaded.dtype
        self.device = loaded.device
        self.context_length = loaded.context_length
        self.vocab_size = loaded.vocab_size
        self.weight_bytes = loaded.network.weight_bytes
        self.num_sparse = min(num_sparse, loaded.network.head_size)

    @classmethod
    def load(
        cls, spec: str, dtype: str = "auto", device: str = "auto", num_sparse: int = 48
    ) -> Self:
        """Load by spec; see `models.draft.load_draft` for specs and errors."""
        return cls(load_draft(spec, dtype, device), num_sparse)

    def open(self, sampling: SamplingParams) -> DraftCache:
        """An empty cache for a new session."""
        return DraftCache(KVCache(), sampling)

    def crop(self, cache: DraftCache, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            LocalError: the cache is shorter than that.
        """
        cache.keys_values.crop(length)

    def prefill(self, cache: DraftCache, tokens: Sequence[int]) -> None:
        """Run tokens without drawing any. The caller cuts long prompts into chunks."""
        if tokens:
            self._run(cache, tokens)

    def draft(
        self,
        cache: DraftCache,
        feed: Sequence[int],
        count: int,
        eos: frozenset[int],
        stop: Callable[[], bool],
    ) -> DraftedWindow:
        """Run `feed`, then draw up to `count` tokens, each run before the next is drawn.

        Fewer come out after a token of `eos`, or once `stop()` is true; it is asked before every
        run. With n > 0 tokens the cache then holds `start + n − 1` positions: the last drafted
        token is not run. With n = 0 it is unchanged.

        Args:
            feed: tokens the cache lacks before the first drafted one, never empty.
            count: how many to draw, at least 1.
        """
        if not feed or count < 1:
            raise LocalError(f"draft needs tokens to run and a count; got {len(feed)} and {count}")
        began = time.perf_counter()
        start = cache.length + len(feed)
        tokens: list[int] = []
        q_ids = np.empty((count, self.num_sparse), dtype=TOKEN_DTYPE)
        q_probs = np.empty((count, self.num_sparse), dtype=PROB_DTYPE)
        pending: Sequence[int] = feed
        for index in range(count):
            if stop():
                break
            logits = self._run(cache, pending)
            q_ids[index], q_probs[index] = self._top_probabilities(logits)
            token = _draw(q_ids[index], q_probs[index], cache.sampling, start + index)
            tokens.append(token)
            pending = (token,)
            if token in eos:
                break
        drafted = len(tokens)
        elapsed_ms = 1e3 * (time.perf_counter() - began)
        return DraftedWindow(start, tuple(tokens), q_ids[:drafted], q_probs[:drafted], elapsed_ms)

    @torch.inference_mode()
    def _run(self, cache: DraftCache, tokens: Sequence[int]) -> Tensor:
        """Logits of the last of `tokens`, float[H]."""
        input_ids = torch.tensor([tokens], dtype=torch.long, device=self.device)
        return self._network.forward(input_ids, cache.keys_values)

    @torch.inference_mode()
    def _top_probabilities(self, logits: Tensor) -> tuple[Int32Array, Float16Array]:
        """The K most probable tokens in canonical order: int32[K] ids, float16[K] probabilities."""
        wide = logits.float()
        top, rows = torch.topk(wide, self.num_sparse)
        probs = torch.exp(top - torch.logsumexp(wide, dim=0)).half().cpu().numpy()
        indices = rows.cpu().numpy()
        vocab = self._network.vocab
        return canonical(indices if vocab is None else vocab[indices], probs)


def _draw(ids: Int32Array, probs: Float16Array, sampling: SamplingParams, position: int) -> int:
    """Draw from exactly what is sent (DESIGN rules 1 and 3)."""
    q = warp(from_wire(ids, probs), sampling)
    if sampling.greedy:
        return q.argmax
    return q.draw(uniform(sampling.seed, position, Purpose.DRAFT))
