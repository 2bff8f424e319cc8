"""One draft in int8 with heads of several sizes, to compare them: all share its layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bus.protocol.arrays import Int32Array
from bus.protocol.errors import ModelError
from engines.catalog.ranking import most_frequent
from engines.catalog.registry import split_head
from engines.torch.draft import convert_trimmed, integer_sources, is_trimmed, load_draft
from engines.torch.integer import IntegerMatrix, IntegerProduct
from engines.torch.integer_decoder import IntegerDecoder
from engines.torch.llama import IntegerBody
from engines.torch.loading import Loaded, load_model


@dataclass(frozen=True, slots=True)
class WideDraft:
    """A draft with the widest head that its weights give.

    Attributes:
        loaded: what is known of it. body: its layers.
        own: int32[H], rising: the tokens of the head that it is used with.
        widest: int32[…], rising: the tokens that a head can have.
    """

    loaded: Loaded
    body: IntegerBody
    own: Int32Array
    widest: Int32Array
    _head: IntegerMatrix

    def head(self, vocab: Int32Array) -> IntegerProduct:
        """The head of the tokens int32[H], rising.

        Raises:
            ModelError: the weights lack a row of them.
        """
        rows = np.searchsorted(self.widest, vocab)
        if not np.array_equal(self.widest[rows.clip(max=len(self.widest) - 1)], vocab):
            raise ModelError(
                f"the draft {self.loaded.name} has head rows of {len(self.widest)} tokens alone, "
                f"and a head of {len(vocab)} others was asked for; give a whole model as --draft"
            )
        return IntegerProduct(self._head.rows(torch.from_numpy(rows)))

    def ranked(self, size: int) -> Int32Array:
        """int32[size], rising: the most frequent tokens.

        Raises:
            ModelError: no ranking of its tokenizer has that many.
        """
        return most_frequent(self.loaded.tokenizer, self.loaded.tokenizer_digest, size)


def load_wide(spec: str) -> WideDraft:
    """Load a draft by spec, as `engines.torch.draft.load_draft` takes it, in int8.

    Raises:
        ModelError: no such model, or it does not run as a Llama or Qwen2 in int8.
    """
    if is_trimmed(spec):
        draft = load_draft(spec, "int8", "cpu")
        assert draft.network.vocab is not None  # a trimmed one
        decoder = convert_trimmed(*integer_sources(spec), widest=True)
        return _wide(draft, decoder, draft.network.vocab)
    name, head_size = split_head(spec)
    whole = load_model(name, "int8", "cpu")
    if not isinstance(whole.model, IntegerDecoder):
        raise ModelError(
            f"{whole.name} does not run as a Llama or Qwen2 in int8, whose head can be cut; "
            "expected one of those as --draft"
        )
    own = np.arange(whole.vocab_size, dtype=np.int32)
    if head_size is not None and head_size < whole.vocab_size:
        own = most_frequent(whole.tokenizer, whole.tokenizer_digest, head_size)
    return _wide(whole, whole.model, own)


def _wide(loaded: Loaded, decoder: IntegerDecoder, own: Int32Array) -> WideDraft:
    size = decoder.head.shape[0]
    tokens = np.arange(size, dtype=np.int32) if decoder.vocab is None else decoder.vocab.numpy()
    widest = tokens[tokens < loaded.vocab_size]  # rows beyond the real tokens are padding
    return WideDraft(loaded, IntegerBody(decoder), own, widest, decoder.head)
