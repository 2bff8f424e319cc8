"""A draft model as a drafter: runs tokens, draws from what will be sent, and looks between tokens
whether it should stop. Used from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from bus.protocol.arrays import PROB_DTYPE, TOKEN_DTYPE, Float16Array, Int32Array
from bus.protocol.errors import LocalError
from decoding.coupling import choose_sparse
from decoding.engine import DraftedWindow, DrafterCapabilities
from decoding.sampling import SamplingParams, canonical, from_wire, warp
from decoding.uniforms import Purpose, uniform
from engines.torch.draft import LoadedDraft, load_draft
from engines.torch.prefixes import Prefix
from engines.torch.probe import probe
from engines.torch.rowwise import exp_sum
from engines.torch.running import RunningModel, SessionCache

_LONGEST_STEP = 16
"""Most tokens that a step runs after a feedback; more are a prompt."""


@dataclass(slots=True)
class DraftCache(SessionCache):
    """One session's cache in the draft."""


class ModelDrafter(RunningModel[DraftCache]):
    """A draft network with its tokenizer, as a `decoding.engine.Drafter`.

    Attributes:
        capabilities: its head is a ranked one where it holds a part of the vocabulary.
        num_sparse: K, probabilities sent for each token, at most the head's size.
        weight_bytes: bytes of weights that one step reads.
        probe: what its passes compute here (`engines.torch.probe`).
        Others as in `RunningModel`.
    """

    def __init__(self, loaded: LoadedDraft, num_sparse: int = 48) -> None:
        if num_sparse < 1:
            raise LocalError(f"num_sparse is {num_sparse}; a draft sends at least one probability")
        super().__init__(loaded)
        self._network = loaded.network
        self.capabilities = DrafterCapabilities(ranked_head=loaded.network.vocab is not None)
        self.probe = probe(loaded.network, loaded.network.head_size, loaded.device)
        self.weight_bytes = loaded.network.weight_bytes
        self.num_sparse = min(num_sparse, loaded.network.head_size)

    @classmethod
    def load(
        cls,
        spec: str,
        dtype: str = "auto",
        device: str = "auto",
        num_sparse: int = 48,
    ) -> Self:
        """Load by spec; see `engines.torch.draft.load_draft` for specs and errors."""
        return cls(load_draft(spec, dtype, device), num_sparse)

    def open(self, sampling: SamplingParams, prompt: Sequence[int] = ()) -> DraftCache:
        """An empty cache for a new session.

        Args:
            prompt: what it will begin with; read by `engines.torch.oracle` alone.
        """
        del prompt
        return DraftCache(Prefix(), sampling)

    def keep(self, cache: DraftCache, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            LocalError: the cache is shorter than that.
        """
        cache.prefix.keep(length)

    @torch.inference_mode()
    def prefill(self, cache: DraftCache, tokens: Sequence[int]) -> None:
        """Run tokens without drawing any, or copy what other sessions have run of them. The caller
        cuts long prompts into chunks."""
        missing = self.prefixes.fill(cache.prefix, tokens, num_rows=0)
        if missing:
            cache.prefix.run(self._network, missing, 0)

    def draft(
        self,
        cache: DraftCache,
        feed: Sequence[int],
        count: int,
        eos: frozenset[int],
        stop: Callable[[], bool],
    ) -> DraftedWindow:
        """As `decoding.engine.Drafter.draft`; each token is run before the next is drawn. With
        n = 0 tokens the cache is unchanged.

        Raises:
            LocalError: nothing to run, or a count below 1.
        """
        if not feed or count < 1:
            raise LocalError(f"draft needs tokens to run and a count; got {len(feed)} and {count}")
        began = time.perf_counter()
        start = cache.length + len(feed)
        tokens: list[int] = []
        q_ids = np.empty((count, self.num_sparse), dtype=TOKEN_DTYPE)
        q_probs = np.zeros((count, self.num_sparse), dtype=PROB_DTYPE)
        pending = list(feed)
        for index in range(count):
            if stop():
                break
            step_began = time.perf_counter()
            logits = self._run(cache, pending)
            q_ids[index], q_probs[index] = self._proposal(logits, cache, start + index)
            token = draw(q_ids[index], q_probs[index], cache.sampling, start + index)
            if len(pending) <= _LONGEST_STEP:  # one that reads a prompt takes its own time
                self.padding.wait(step_began)
            tokens.append(token)
            pending = [token]
            if token in eos:
                break
        return DraftedWindow(
            start, cache.length, tuple(tokens), q_ids[: len(tokens)], q_probs[: len(tokens)],
            1e3 * (time.perf_counter() - began),
        )  # fmt: skip

    @torch.inference_mode()
    def _run(self, cache: DraftCache, tokens: Sequence[int]) -> Tensor:
        """Logits of the last of `tokens`, float[H]."""
        missing = self.prefixes.fill(cache.prefix, tokens, num_rows=1)
        return cache.prefix.run(self._network, missing, 1)[0]

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


def draw(ids: Int32Array, probs: Float16Array, sampling: SamplingParams, position: int) -> int:
    """The seed's choice from exactly what is sent, or could be; with residual coupling a draw."""
    q = warp(from_wire(ids, probs), sampling)
    if sampling.greedy:
        return q.argmax
    if sampling.choosing:
        return choose_sparse(q, sampling.seed, position)
    return q.draw(uniform(sampling.seed, position, Purpose.DRAFT))
