"""Which tokens a text is likely to hold: rankings for heads of a part of the vocabulary.

A draft's head reads a row for each token it can write, most of which are rare in any text. With the
V most frequent tokens alone a step costs less and is right about as often (FR-Spec, Zhao et al.
2025); every other token has probability 0 under the draft, and verification is over the whole
vocabulary, so no answer changes. A ranking belongs to a tokenizer: it lies in
`engines/catalog/rankings`, or where `e2sci rank` writes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bus.protocol.arrays import Int32Array
from bus.protocol.errors import ModelError
from engines.catalog.places import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_SHIPPED = Path(__file__).with_name("rankings")
_KEY, _DIGEST = "ids", "tokenizer_digest"


def own_rankings() -> Path:
    """Where a user's rankings are."""
    return cache_root() / "rankings"


def most_frequent(tokenizer: Tokenizer, digest: str, size: int) -> Int32Array:
    """int32[size], rising: the most frequent tokens of a tokenizer, its special ones among them.

    Raises:
        ModelError: there is no ranking of this tokenizer, or it is shorter.
    """
    ranked = _ranking(digest)
    if ranked is None:
        raise ModelError(
            "no ranking of this model's tokens is here, which a head of fewer tokens needs; make "
            "one with: e2sci rank MODEL --corpus TEXTS.jsonl"
        )
    special = sorted(tokenizer.added_tokens_decoder)
    wanted = dict.fromkeys([*special, *ranked.tolist()])
    if not len(special) < size <= len(wanted):
        raise ModelError(
            f"a head of {size} tokens was asked for; expected more than the {len(special)} special "
            f"tokens and at most {len(wanted)}, as many as are ranked"
        )
    return np.sort(np.array(list(wanted)[:size], dtype=np.int32))


@dataclass(frozen=True, slots=True)
class Ranking:
    """Tokens by their frequency in texts.

    Attributes:
        ids: int32[size], most frequent first. Tokens that the texts do not hold follow by their
            id: of a byte-pair encoding, frequent tokens have low ones.
        counted: tokens of the texts. distinct: how many different ones.
        covered: share of the texts' tokens that `ids` holds; 0 without texts.
    """

    ids: Int32Array
    counted: int
    distinct: int
    covered: float


def rank(tokenizer: Tokenizer, texts: Iterable[str], vocab_size: int, size: int) -> Ranking:
    """The `size` most frequent of the tokens below `vocab_size`."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer.encode(text, add_special_tokens=False))
    ordered = sorted(range(vocab_size), key=lambda token: (-counts[token], token))[:size]
    total = counts.total()
    inside = sum(counts[token] for token in ordered)
    return Ranking(
        np.array(ordered, dtype=np.int32), total, sum(count > 0 for count in counts.values()),
        inside / total if total else 0.0,
    )  # fmt: skip


def save_ranking(path: Path, ranked: Int32Array, digest: str) -> None:
    """Write a ranking of the tokenizer of this digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({_KEY: torch.from_numpy(ranked)}, path, metadata={_DIGEST: digest})


def _ranking(digest: str) -> Int32Array | None:
    for path in sorted([*own_rankings().glob("*.safetensors"), *_SHIPPED.glob("*.safetensors")]):
        with safe_open(path, "np") as file:
            if (file.metadata() or {}).get(_DIGEST) == digest:
                ranked: Int32Array = file.get_tensor(_KEY)
                return ranked
    return None
