"""Which tokens the draft's head gets: the frequency-ranked head of FR-Spec (Zhao et al., 2025).

A head over the whole vocabulary is a third of a small draft's work, while a few thousand tokens
make up nearly every text. Tokens outside have probability 0 under the draft; the target still
verifies over its full vocabulary, so the head costs acceptance, never exactness.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from training.distill.records import Record


def expected_counts(records: Iterable[Record], vocab_size: int) -> Tensor:
    """How often the target would write each token where the answers stand: float64[vocab_size].

    The sum of its probabilities and not a count of what it chose: smoother on few answers.
    """
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for record in records:
        known = record.top_ids < vocab_size
        ids, probs = record.top_ids[known].long(), record.top_probs[known].double()
        counts.index_add_(0, ids, probs)
    return counts


def prompt_counts(records: Iterable[Record], vocab_size: int) -> Tensor:
    """How often each token stands in prompts: float64[vocab_size]."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for record in records:
        ids = record.prompt[record.prompt < vocab_size].long()
        counts.index_add_(0, ids, torch.ones(ids.numel(), dtype=torch.float64))
    return counts


def rank_vocabulary(counts: Tensor, size: int, special: Iterable[int]) -> Tensor:
    """The head's tokens: `special` ones, then the most frequent; sorted int32[min(size, V)].

    Tokens never seen follow by rising id: tokenizers number their merges from frequent to rare.

    Args:
        counts: float64[V].
    """
    ranked = counts.clone()
    ranked[[token for token in special if token < counts.numel()]] = torch.inf
    order = torch.sort(ranked, descending=True, stable=True).indices
    return order[:size].sort().values.int()
