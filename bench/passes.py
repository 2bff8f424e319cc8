"""What one draft step and one target pass cost here, against plain transformers.

All run in this process on one thread; ours and plain alternate, so drift hits both alike, and
medians are compared. The floor is the bytes of weights a pass reads ÷ the memory bandwidth measured
in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from decoding.sampling import SamplingParams
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel

CONTEXT = 128
PASS_SIZES = (1, 2, 4, 8, 16)
GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True)
class PassTiming:
    """One line of the table.

    Attributes:
        ours_ms: median, as the worker runs it.
        plain_ms: median of transformers' `model(...)` of the target for the same tokens, and for
            one token beside a draft step.
        weight_bytes: bytes of weights that our pass reads.
        bandwidth: bytes per second one core reads from memory.
    """

    name: str
    num_tokens: int
    ours_ms: float
    plain_ms: float
    weight_bytes: int
    bandwidth: float

    @property
    def ratio(self) -> float:
        return self.ours_ms / self.plain_ms

    @property
    def read_gb_per_s(self) -> float:
        """How fast our pass reads its weights."""
        return self.weight_bytes / self.ours_ms / 1e6

    @property
    def floor_ms(self) -> float:
        """What reading the weights alone takes."""
        return 1e3 * self.weight_bytes / self.bandwidth


def measure_passes(
    target: TargetModel, draft: ModelDrafter, plain: Any, repeats: int, tick: Callable[[], None]
) -> list[PassTiming]:
    """Time passes of `PASS_SIZES` tokens and a draft step after a context of `CONTEXT` tokens.

    Args:
        plain: the target's model as transformers loads it.
        tick: called after each repeat, for a progress bar; `num_ticks(repeats)` times.
    """
    bandwidth = memory_bandwidth()
    rng = np.random.default_rng(0)
    context = rng.integers(0, target.vocab_size, CONTEXT).tolist()
    runs = [DraftStep(draft, context).run, _Plain(plain, context, context[-1:]).run]
    ours_ms, plain_ms = map(statistics.median, alternate(runs, repeats, tick))
    timings = [PassTiming("draft step", 1, ours_ms, plain_ms, draft.weight_bytes, bandwidth)]
    for size in PASS_SIZES:
        tokens = rng.integers(0, target.vocab_size, size).tolist()
        runs = [TargetPass(target, context, tokens).run, _Plain(plain, context, tokens).run]
        ours_ms, plain_ms = map(statistics.median, alternate(runs, repeats, tick))
        weight_bytes = target.network.weight_bytes
        timings.append(PassTiming("target pass", size, ours_ms, plain_ms, weight_bytes, bandwidth))
    return timings


def num_ticks(repeats: int) -> int:
    return repeats * (len(PASS_SIZES) + 1)


def memory_bandwidth() -> float:
    """Bytes per second one thread reads from memory: the best of a few sums over 512 MB."""
    block = torch.ones(128 * 2**20)
    best = min(_seconds(block.sum) for _ in range(5))
    return block.numel() * block.element_size() / best


class TargetPass:
    """A pass as the cloud worker makes it, rows reduced at 48 ids each; then rolled back."""

    def __init__(self, target: TargetModel, context: list[int], tokens: list[int]) -> None:
        self._target, self._tokens = target, tokens
        self._cache = target.open(GREEDY)
        target.prefill(self._cache, context)
        self._row_ids = [np.arange(48, dtype=np.int32)] * len(tokens)

    def run(self) -> float:
        _, elapsed_ms = self._target.forward(self._cache, self._tokens, self._row_ids)
        self._target.keep(self._cache, CONTEXT)
        return elapsed_ms


class _Plain:
    """The same tokens through `model(...)` with transformers' own cache."""

    def __init__(self, model: Any, context: list[int], tokens: list[int]) -> None:
        self._model, self._tokens = model, torch.tensor([tokens])
        self._cache = DynamicCache()
        with torch.inference_mode():
            model(torch.tensor([context]), cache=self._cache)

    @torch.inference_mode()
    def run(self) -> float:
        elapsed_ms = 1e3 * _seconds(lambda: self._model(self._tokens, cache=self._cache))
        self._cache.crop(-self._tokens.shape[1])
        return elapsed_ms


class DraftStep:
    """A step as the edge worker makes it, drawing included: the mean of a window of eight."""

    def __init__(self, draft: ModelDrafter, context: list[int]) -> None:
        self._draft, self._feed = draft, context[-1:]
        self._cache = draft.open(GREEDY)
        draft.prefill(self._cache, context)

    def run(self) -> float:
        window = self._draft.draft(self._cache, self._feed, 8, frozenset(), stop=lambda: False)
        self._draft.keep(self._cache, CONTEXT)
        return window.draft_ms / len(window.tokens)


def alternate(
    runs: Sequence[Callable[[], float]], repeats: int, tick: Callable[[], None]
) -> list[list[float]]:
    """The milliseconds that each of `runs` returns, interleaved, after one warm-up each.

    Args:
        tick: called after each repeat.
    """
    for run in runs:
        run()
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, kept in zip(runs, samples, strict=True):
            kept.append(run())
        tick()
    return samples


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
