"""Draft steps timed on one core, the drafts interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from bench.cores import one_core
from bench.passes import CONTEXT, GREEDY
from engines.torch.drafter import DraftCache, ModelDrafter

STEPS = 8
"""Of one timing."""
Draft = TypeVar("Draft", bound=ModelDrafter)
Sample = TypeVar("Sample")


def timed(
    drafts: Sequence[Draft],
    repeats: int,
    sample: Callable[[Draft, DraftCache], Sample],
    tick: Callable[[], None] = lambda: None,
) -> list[list[Sample]]:
    """Samples of each draft, `repeats` of them, after one that warms up.

    Args:
        sample: times a draft on a cache of `CONTEXT` tokens, and leaves as many.
    """
    with one_core():
        context = np.random.default_rng(0).integers(0, 256, CONTEXT).tolist()
        caches = [draft.open(GREEDY) for draft in drafts]
        for draft, cache in zip(drafts, caches, strict=True):
            draft.prefill(cache, context)
            sample(draft, cache)
        samples: list[list[Sample]] = [[] for _ in drafts]
        for _ in range(repeats):
            for draft, cache, kept in zip(drafts, caches, samples, strict=True):
                kept.append(sample(draft, cache))
            tick()
    return samples


def window_ms(draft: ModelDrafter, cache: DraftCache) -> float:
    """Milliseconds of a step, of a window of `STEPS` tokens that is forgotten again."""
    window = draft.draft(cache, [0], STEPS, frozenset(), stop=lambda: False)
    draft.keep(cache, CONTEXT)
    return window.draft_ms / len(window.tokens)
