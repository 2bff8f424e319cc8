"""What one draft step and one target pass cost here, against plain transformers.

Both run in this process on one thread; A and B alternate, so drift hits both alike, and medians
are compared. The floor is the bytes of weights a pass reads ÷ the memory bandwidth measured in
the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from cloud_worker.target_model import TargetModel
from decoding.sampling import SamplingParams
from edge_worker.draft_model import DraftModel

CONTEXT = 128
PASS_SIZES = (1, 4, 8, 16)
GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True)
class PassTiming:
    """Medians in milliseconds; `plain_ms` is transformers' `model(...)` for the same tokens."""

    name: str
    num_tokens: int
    ours_ms: float
    plain_ms: float | None
    floor_ms: float

    @property
    def ratio(self) -> float | None:
        return None if self.plain_ms is None else self.ours_ms / self.plain_ms


def measure_passes(
    target: TargetModel, draft: DraftModel, repeats: int, tick: Callable[[], None]
) -> list[PassTiming]:
    """Time passes of `PASS_SIZES` tokens and a draft step behind a context of `CONTEXT` tokens.

    Args:
        tick: called after each repeat, for a progress bar; `num_ticks(repeats)` times.
    """
    bandwidth = memory_bandwidth()
    rng = np.random.default_rng(0)
    context = rng.integers(0, target.vocab_size, CONTEXT).tolist()
    target_floor_ms = 1e3 * _weight_bytes(target.model) / bandwidth
    timings = []
    for size in PASS_SIZES:
        tokens = rng.integers(0, target.vocab_size, size).tolist()
        ours, plain = _Ours(target, context, tokens), _Plain(target.model, context, tokens)
        ours_ms, plain_ms = _alternate([ours.run, plain.run], repeats, tick)
        timings.append(PassTiming("target pass", size, ours_ms, plain_ms, target_floor_ms))
    step_ms = _draft_step_ms(draft, context, repeats, tick)
    draft_floor_ms = 1e3 * draft.weight_bytes / bandwidth
    return [PassTiming("draft step", 1, step_ms, None, draft_floor_ms), *timings]


def num_ticks(repeats: int) -> int:
    return repeats * (len(PASS_SIZES) + 1)


def memory_bandwidth() -> float:
    """Bytes per second one thread reads from memory: the best of a few sums over 512 MB."""
    block = torch.ones(128 * 2**20)
    best = min(_seconds(block.sum) for _ in range(5))
    return block.numel() * block.element_size() / best


def _weight_bytes(model: Any) -> int:
    """Bytes a pass reads; a tied embedding is read once, as the head."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


class _Ours:
    """A pass as the cloud worker makes it, rows reduced at 48 ids each; then rolled back."""

    def __init__(self, target: TargetModel, context: list[int], tokens: list[int]) -> None:
        self._target, self._tokens = target, tokens
        self._cache = target.open(GREEDY)
        target.prefill(self._cache, context)
        self._row_ids = [np.arange(48, dtype=np.int32)] * len(tokens)

    def run(self) -> None:
        self._target.forward(self._cache, self._tokens, self._row_ids)
        self._target.crop(self._cache, CONTEXT)


class _Plain:
    """The same tokens through `model(...)` with transformers' own cache."""

    def __init__(self, model: Any, context: list[int], tokens: list[int]) -> None:
        self._model, self._tokens = model, torch.tensor([tokens])
        self._cache = DynamicCache()
        with torch.inference_mode():
            model(torch.tensor([context]), cache=self._cache)

    @torch.inference_mode()
    def run(self) -> None:
        self._model(self._tokens, cache=self._cache)
        self._cache.crop(-self._tokens.shape[1])


def _draft_step_ms(
    draft: DraftModel, context: list[int], repeats: int, tick: Callable[[], None]
) -> float:
    cache = draft.open(GREEDY)
    draft.prefill(cache, context)
    samples = []
    for _ in range(repeats):
        window = draft.draft(cache, context[-1:], 8, frozenset(), stop=lambda: False)
        samples.append(window.draft_ms / len(window.tokens))
        draft.crop(cache, CONTEXT)
        tick()
    return statistics.median(samples)


def _alternate(
    runs: list[Callable[[], None]], repeats: int, tick: Callable[[], None]
) -> tuple[float, ...]:
    """Median milliseconds of each, run in turns, after one warm-up each."""
    for run in runs:
        run()
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, kept in zip(runs, samples, strict=True):
            kept.append(1e3 * _seconds(run))
        tick()
    return tuple(statistics.median(kept) for kept in samples)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
