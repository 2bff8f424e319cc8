"""The target model as the cloud worker's model thread uses it.

One pass over a window yields one row for each position; rows are reduced on the device
(`cloud_worker.rows`). Used from one thread; knows neither asyncio nor sessions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bus.arrays import Float64Array, Int32Array
from bus.errors import LocalError
from cloud_worker.rows import Rows
from decoding.acceptance import TargetRow
from decoding.sampling import SamplingParams
from models.linears import integer, packed
from models.loading import LoadedModel, load_model
from models.network import CausalNetwork
from models.padding import Padding
from models.precision import NumberFormat
from models.prefixes import Prefix, PrefixCache
from models.probe import probe


@dataclass(slots=True)
class TargetCache:
    """One session's cache in the target, how its tokens are chosen, and the last pass's rows."""

    prefix: Prefix
    sampling: SamplingParams
    rows: Rows | None = None

    @property
    def length(self) -> int:
        """Positions held: the next token run stands at this position."""
        return self.prefix.length


class TargetModel:
    """A causal language model with its tokenizer.

    Attributes:
        probe: what its passes compute here (`models.probe`).
        network: its forward pass, also for references that run it without this class's caches.
        padding: makes passes last at least a set time, to measure as on another device.
        prefixes: lets sessions reuse what others have run; off until a worker replaces it.
        Others as in `models.loading.LoadedModel`.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        """Take over `loaded`, whose `model` is used up."""
        layout = integer if loaded.dtype is NumberFormat.INT8 else packed
        self.network = CausalNetwork(loaded.model, loaded.vocab_size, layout)
        self.probe = probe(self.network, loaded.vocab_size, loaded.device)
        self.tokenizer = loaded.tokenizer
        self.tokenizer_digest = loaded.tokenizer_digest
        self.name = loaded.name
        self.dtype = loaded.dtype
        self.device = loaded.device
        self.context_length = loaded.context_length
        self.vocab_size = loaded.vocab_size
        self.eos_tokens = loaded.eos_tokens
        self.padding = Padding()
        self.prefixes = PrefixCache()

    @classmethod
    def load(cls, spec: str, dtype: str = "auto", device: str = "auto") -> Self:
        """Load by spec; see `models.loading.load_model` for specs and errors."""
        return cls(load_model(spec, dtype, device))

    def open(self, sampling: SamplingParams) -> TargetCache:
        """An empty cache for a new session."""
        return TargetCache(Prefix(), sampling)

    def close(self, cache: TargetCache) -> None:
        """The session has ended: keep what it has run for others."""
        self.prefixes.keep(cache.prefix)

    def crop(self, cache: TargetCache, length: int) -> None:
        """Forget every position from `length` on. The last pass's rows stay.

        Raises:
            LocalError: the cache is shorter than that.
        """
        cache.prefix.crop(length)

    @torch.inference_mode()
    def prefill(self, cache: TargetCache, tokens: Sequence[int]) -> None:
        """Run tokens nobody judges, or copy what other sessions have run of them. The caller cuts
        long prompts into chunks."""
        if not tokens:
            return
        cache.rows = None
        missing = self.prefixes.fill(cache.prefix, tokens, num_rows=0)
        if missing:
            cache.prefix.run(self.network, missing, 1, self.device)

    def forward(
        self, cache: TargetCache, feed: Sequence[int], row_ids: Sequence[Int32Array]
    ) -> tuple[list[TargetRow], float]:
        """Run `feed` in one pass and reduce the last len(row_ids) positions.

        Args:
            feed: tokens behind what the cache holds.
            row_ids: for each of those positions int32[K], the tokens to give probabilities of (K
                may be 0 and may differ); ids below `vocab_size`.

        Returns:
            One row for each entry of `row_ids`, and the wall time in milliseconds.

        Raises:
            LocalError: no rows asked for, or more than tokens fed.
        """
        if not 1 <= len(row_ids) <= len(feed):
            raise LocalError(
                f"asked for {len(row_ids)} rows of a pass over {len(feed)} tokens; expected at "
                "least one row and no more rows than tokens"
            )
        began = time.perf_counter()
        logits = self._run(cache, feed, num_rows=len(row_ids))
        with torch.inference_mode():
            cache.rows = Rows.of(logits, cache.sampling)
            reduced = cache.rows.reduce(row_ids)
        self.padding.wait(began, len(feed))
        return reduced, 1e3 * (time.perf_counter() - began)

    def full_row(self, cache: TargetCache, index: int) -> Float64Array:
        """float64[V], the warped distribution of row `index` of the last pass.

        Raises:
            LocalError: there is no such row.
        """
        with torch.inference_mode():
            return self._rows(cache, index).dense(index)

    def reduce_row(self, cache: TargetCache, index: int, ids: Int32Array) -> TargetRow:
        """Row `index` of the last pass again, reduced at `ids`: int32[K].

        Raises:
            LocalError: there is no such row.
        """
        with torch.inference_mode():
            return self._rows(cache, index).only(index).reduce([ids])[0]

    @staticmethod
    def _rows(cache: TargetCache, index: int) -> Rows:
        rows = cache.rows
        if rows is None or not 0 <= index < rows.logits.shape[0]:
            raise LocalError(f"the last pass left no row {index}")
        return rows

    @torch.inference_mode()
    def _run(self, cache: TargetCache, tokens: Sequence[int], num_rows: int) -> Tensor:
        """float[num_rows, V] logits of the last tokens, over the real vocabulary."""
        missing = self.prefixes.fill(cache.prefix, tokens, num_rows)
        return cache.prefix.run(self.network, missing, num_rows, self.device)
