"""EAGLE-3's draft layer while it learns (Li et al., 2025, arXiv 2503.01840).

With f_i the target's hidden states at three depths, each divided by its root mean square [ours],
and n(x) = x / √(mean x² + ε):

    g_i = F·f_i
    u_i = [n(emb(x_{i+1})) ∘ e ; n(g_i) ∘ f]
    h_i = g_i + O·attention(RoPE(Q·u), RoPE(K·u), V·u)_i
    a_i = h_i + D·(silu(G·m_i) ∘ (U·m_i))            m_i = n(h_i) ∘ m
    logits_i = H·(n(a_i) ∘ o), of x_{i+2}

*Training-time test*: what follows a drafted token reads the layer's own output in place of a
feature of the target. So the layer is unrolled: in step j it reads a_i of step j − 1 as g_i, with
the token j places further, and attends to the keys of step 0 up to i and to its own of steps 1 … j.
Every step's tokens are learnt, step j with weight 0.8^j.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.torch.rope import Rotation, turned
from engines.torch.speculators.file import Eagle3Config
from training.speculators.texts import Text, labels

DECAY = 0.8
_STANDARD_DEVIATION = 0.02


class Eagle3(nn.Module):
    """One decoder layer with the shape of the target's.

    Args:
        config: what the layer's file will say; RoPE is the plain one, of its base.
        embedding: float32[V, d], the target's, in the model's own basis.
        head_rows: float32[H, d], the head to begin with, at `vocab`: int64[H], rising.
        unroll: tokens foreseen in training.
    """

    kind = "eagle3"

    def __init__(
        self, config: Eagle3Config, embedding: Tensor, head_rows: Tensor, vocab: Tensor, unroll: int
    ) -> None:
        super().__init__()
        hidden, width = config.hidden, config.intermediate_size
        self.depth = unroll
        self._num_heads, self._num_kv = config.num_attention_heads, config.num_key_value_heads
        self._head_dim, self._epsilon = config.head_dim, config.rms_norm_eps
        self._rotation = Rotation.plain(config.head_dim, config.rope_theta)

        def linear(num_in: int, num_out: int) -> nn.Linear:
            made = nn.Linear(num_in, num_out, bias=False)
            nn.init.normal_(made.weight, std=_STANDARD_DEVIATION)
            return made

        self.fc = linear(3 * hidden, hidden)
        with torch.no_grad():  # begin with the highest level
            self.fc.weight[:, 2 * hidden :] += torch.eye(hidden)
        self.q_proj = linear(2 * hidden, self._num_heads * self._head_dim)
        self.k_proj = linear(2 * hidden, self._num_kv * self._head_dim)
        self.v_proj = linear(2 * hidden, self._num_kv * self._head_dim)
        self.o_proj = linear(self._num_heads * self._head_dim, hidden)
        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden)
        self.head = nn.Linear(hidden, len(vocab), bias=False)
        self.head.weight = nn.Parameter(head_rows.clone())
        self.embed_norm, self.feature_norm, self.mlp_norm, self.out_norm = (
            nn.Parameter(torch.ones(hidden)) for _ in range(4)
        )
        self._embedding, self._vocab = embedding, vocab
        self._row_of_token = torch.full((len(embedding),), -1)
        self._row_of_token[vocab] = torch.arange(len(vocab))

    def loss(self, texts: Sequence[Text]) -> Tensor:
        """Σ_j 0.8^j · mean cross-entropy of step j, over the answers' tokens in the vocabulary."""
        losses = []
        for j, (logits, rows) in enumerate(self._steps(texts)):
            count = (rows >= 0).sum().clamp(min=1)
            total = F.cross_entropy(logits, rows, ignore_index=-1, reduction="sum")
            losses.append(DECAY**j * total / count)
        return torch.stack(losses).sum()

    @torch.inference_mode()
    def right(self, text: Text) -> Tensor:
        """bool[A, depth], whether a chain foresees the token at each of its places, those before it
        given."""
        steps = [(logits.argmax(-1) == rows) & (rows >= 0) for logits, rows in self._steps([text])]
        return torch.stack(steps, dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """What a speculator's file holds, in float32."""
        return dict(self.state_dict()) | {"vocab": self._vocab.int()}

    def _unit(self, states: Tensor) -> Tensor:
        """n(x) of float32[…, d]."""
        return F.rms_norm(states, states.shape[-1:], eps=self._epsilon)

    def _steps(self, texts: Sequence[Text]) -> list[tuple[Tensor, Tensor]]:
        """Of each step of the unrolling: logits float32[Σ A, H] and the rows int64[Σ A] that are
        right, −1: none. Texts lie side by side, padded on the right."""
        length = max(len(text.features) for text in texts)
        g = self.fc(_padded([text.features for text in texts], length).flatten(2))
        tokens = _padded([text.tokens for text in texts], length + self.depth + 1)
        where = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, text in enumerate(texts):
            where[row, text.num_prompt - 2 : len(text.features)] = True
        wanted = torch.cat([labels(text.answer, self.depth) for text in texts])
        rows = torch.where(wanted >= 0, self._row_of_token[wanted.clamp(min=0)], -1)
        keys, values, steps = list[Tensor](), list[Tensor](), []
        for j in range(self.depth):
            g = self._layer(g, tokens[:, 1 + j : 1 + j + length], j, keys, values)
            states = self._unit(g[where]) * self.out_norm
            steps.append((self.head(states), rows[:, j]))
        return steps

    def _layer(
        self, g: Tensor, tokens: Tensor, j: int, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """a of step j; appends the step's keys and values, float32[B, key heads, L, w] each."""
        count, length = tokens.shape
        embedded = self._unit(self._embedding[tokens]) * self.embed_norm
        u = torch.cat((embedded, self._unit(g) * self.feature_norm), dim=-1)
        cos, sin = (x[:, 0] for x in self._rotation.at(range(j, j + length)))

        def heads(rows: Tensor) -> Tensor:
            return rows.view(count, length, -1, self._head_dim).transpose(1, 2)

        query = turned(heads(self.q_proj(u)), cos, sin)
        keys.append(turned(heads(self.k_proj(u)), cos, sin))
        values.append(heads(self.v_proj(u)))
        mixed = self._attention(query, keys, values).transpose(1, 2).reshape(count, length, -1)
        h: Tensor = g + self.o_proj(mixed)
        m = self._unit(h) * self.mlp_norm
        raised: Tensor = self.down_proj(F.silu(self.gate_proj(m)) * self.up_proj(m))
        return h + raised

    def _attention(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """To the keys of step 0 up to a position, and to those of later steps at it."""
        group, length = self._num_heads // self._num_kv, query.shape[2]
        first_keys = keys[0].repeat_interleave(group, dim=1)
        first_values = values[0].repeat_interleave(group, dim=1)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = [(query @ first_keys.transpose(2, 3)).masked_fill(later, -torch.inf)]
        for key in keys[1:]:
            own = (query * key.repeat_interleave(group, dim=1)).sum(-1, keepdim=True)
            scores.append(own)
        weights = (torch.cat(scores, dim=-1) / self._head_dim**0.5).softmax(dim=-1)
        out: Tensor = weights[..., :length] @ first_values
        for step, value in enumerate(values[1:]):
            share = weights[..., length + step, None]
            out = out + share * value.repeat_interleave(group, dim=1)
        return out


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """[B, length, …]: zeros after the end of each."""
    out = rows[0].new_zeros((len(rows), length, *rows[0].shape[1:]))
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out.float() if out.dtype == torch.float16 else out
