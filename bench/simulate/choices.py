"""A draft's first and second choices on answers that the target has written, and how sure it was.

The margin is p(first) − p(second), at temperature 1. What it says about being right is counted in
bins; recorded tokens can be drawn anew so that the draft is wrong at any rate.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engines.second_choices import OTHER, Choice
from engines.torch.cache import KVCache
from engines.torch.draft import TrimmedDraft, WholeDraft, load_draft
from engines.torch.oracle import RecordedAnswer

NUM_BINS = 12


@dataclass(frozen=True, slots=True)
class Belief:
    """How often first and second choice were right, by margin.

    Attributes:
        borders: of the bins, rising. rates: (first, second) in each bin.
    """

    borders: tuple[float, ...]
    rates: tuple[tuple[float, float], ...]

    def __call__(self, margin: float) -> tuple[float, float]:
        return self.rates[bisect_right(self.borders, margin)]


def belief(choices: Sequence[Choice]) -> Belief:
    """Counted in bins of as many tokens each; a bin counts one right, one second and one other more
    than it has, so that nothing is certain."""
    ordered = sorted(choices, key=lambda choice: choice.margin)
    cuts = [len(ordered) * i // NUM_BINS for i in range(NUM_BINS + 1)]
    bins = [ordered[a:b] for a, b in itertools.pairwise(cuts)]
    rates = []
    for found in bins:
        counts = [1 + sum(choice.rank == rank for choice in found) for rank in (0, 1)]
        rates.append((counts[0] / (len(found) + 3), counts[1] / (len(found) + 3)))
    return Belief(tuple(found[0].margin for found in bins[1:]), tuple(rates))


def drawn(choices: Sequence[Choice], error_rate: float, num_tokens: int, seed: int) -> list[Choice]:
    """Recorded tokens in a random order, so mixed that the first choice is wrong at that rate."""
    rng = random.Random(seed)
    right = [choice for choice in choices if choice.rank == 0]
    wrong = [choice for choice in choices if choice.rank]
    return [rng.choice(wrong if rng.random() < error_rate else right) for _ in range(num_tokens)]


@torch.inference_mode()
def recorded_choices(spec: str, recorded: Sequence[RecordedAnswer]) -> list[list[Choice]]:
    """Of a draft model, given each answer so far."""
    draft = load_draft(spec, "float32")
    network = draft.network
    assert isinstance(network, WholeDraft | TrimmedDraft)  # what `load_draft` gives
    found = []
    for answer in recorded:
        text = torch.tensor(answer.prompt + answer.answer[:-1], device=draft.device)
        rows = network.logits(text, KVCache(), len(answer.answer)).softmax(-1)
        best = rows.topk(2, dim=-1)
        ids = best.indices.cpu().numpy()
        ids = ids if network.vocab is None else network.vocab[ids]
        margins = (best.values[:, 0] - best.values[:, 1]).tolist()
        found.append(
            [
                Choice(_rank(pair.tolist(), token), margin)
                for pair, token, margin in zip(ids, answer.answer, margins, strict=True)
            ]
        )
    return found


def _rank(pair: Sequence[int], token: int) -> int:
    return pair.index(token) if token in pair else OTHER
