"""Medusa's heads while they learn (Cai et al., 2024, arXiv 2401.10774; Medusa-1: the target stays).

With h_i the target's state after the last norm, its gain left out, and E' the target's head with
that gain, head k foresees token x_{i+2+k}, x_{i+1} being the target's own choice:

    logits_{i,k} = E'·(h_i + SiLU(W_k·h_i + b_k))

A head begins as the target's own (W_k = 0, b_k = 0), and shares E' with it, of which only the rows
of frequent tokens are kept [ours; published heads have matrices of their own].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.speculators.texts import Text, labels

DECAY = 0.8
"""Weight of each head's loss against that of the head before [published]."""


class Medusa(nn.Module):
    """Heads 0 … n−1.

    Args:
        head_rows: float32[H, d], E' at `vocab`.
        vocab: int64[H], the tokens that can be drafted, rising.
    """

    kind = "medusa"

    def __init__(self, num_heads: int, head_rows: Tensor, vocab: Tensor, vocab_size: int) -> None:
        super().__init__()
        hidden = head_rows.shape[1]
        self.heads = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(num_heads))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self._head_rows, self._vocab = head_rows, vocab
        self._row_of_token = torch.full((vocab_size,), -1)
        self._row_of_token[vocab] = torch.arange(len(vocab))

    @property
    def depth(self) -> int:
        """Tokens that are foreseen."""
        return len(self.heads)

    def forward(self, states: Tensor) -> Tensor:
        """float32[n, d] → logits float32[n, heads, H]."""
        raised = [states + F.silu(head(states)) for head in self.heads]
        return torch.stack(raised, dim=1) @ self._head_rows.T

    def loss(self, texts: Sequence[Text]) -> Tensor:
        """Σ_k 0.8^k · mean cross-entropy of head k, over the answers' tokens in the vocabulary."""
        states = torch.cat([text.features for text in texts]).float()
        rows = self._rows(texts)
        logits = self(states)
        losses = [
            F.cross_entropy(logits[:, k], rows[:, k], ignore_index=-1, reduction="sum")
            / (rows[:, k] >= 0).sum().clamp(min=1)
            for k in range(self.depth)
        ]
        return torch.stack([DECAY**k * loss for k, loss in enumerate(losses)]).sum()

    @torch.inference_mode()
    def right(self, text: Text) -> Tensor:
        """bool[A, heads], whether each head foresees the token at its place."""
        rows = self._rows([text])
        chosen: Tensor = self(text.features.float()).argmax(dim=-1)
        return (chosen == rows) & (rows >= 0)

    def tensors(self) -> dict[str, Tensor]:
        """What a speculator's file holds, in float32."""
        return dict(self.state_dict()) | {"vocab": self._vocab.int()}

    def _rows(self, texts: Sequence[Text]) -> Tensor:
        """int64[Σ A, heads]: the head's row of each token to foresee; −1: none."""
        tokens = torch.cat([labels(text.answer, self.depth) for text in texts])
        return torch.where(tokens >= 0, self._row_of_token[tokens.clamp(min=0)], -1)
