"""Texts to learn from: a prompt, the target's answer, and its hidden states there."""

from __future__ import annotations

import torch
from msgspec import Struct
from torch import Tensor


class Text(Struct, frozen=True):
    """One prompt of P ≥ 2 tokens with its answer of A.

    Attributes:
        tokens: int64[P + A].
        features: float16: of Medusa [A, d], the last states of positions P−2 … P+A−3; of EAGLE-3
            [P+A−2, 3, d], three levels of positions 0 … P+A−3, each divided by its root mean
            square.
    """

    tokens: Tensor
    num_prompt: int
    features: Tensor

    @property
    def prompt(self) -> Tensor:
        """int64[P]."""
        return self.tokens[: self.num_prompt]

    @property
    def answer(self) -> Tensor:
        """int64[A]."""
        return self.tokens[self.num_prompt :]


def labels(answer: Tensor, depth: int) -> Tensor:
    """int64[A, depth]: at [j, k] the answer's token j + k; −1 beyond its end."""
    padded = torch.cat([answer, torch.full((depth,), -1)])
    return padded.unfold(0, depth, 1)[: len(answer)]
