"""The forward pass of a Llama as one plain function of a few operations.

transformers' module tree spends about as long in Python as a small model's weights need from
memory. This is the same arithmetic on the same weights and the same cache, for one session at a
time (no batch, no padding):

    x ← x + O·attention(RoPE(Q·n(x)), RoPE(K·n(x)), V·n(x))        n(x) = g ∘ x / √(mean x² + ε)
    x ← x + D·(silu(G·n(x)) ∘ (U·n(x)))

with RoPE(v) = v ∘ cos mθ + swap(v) ∘ (−sin mθ, sin mθ) at position m, where swap exchanges a head's
halves (Su et al. 2021, in the order of Llama's published weights). Grouped-query heads are not
repeated: the g queries that share a key head stand as g rows of one attention.

Only float32 on a CPU, where the tree is the bottleneck; `runs_as_llama` says for which configs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaModel

from models.cache import KVCache
from models.linears import Layout, Product

_CHANGING_ROPES = ("dynamic", "longrope")  # their angles depend on the length run so far
_ROPE_BLOCK = 512  # positions of the rotation table computed at a time


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """One layer: products, and gains g√h of the norms, float32[hidden]."""

    attention_gain: Tensor
    qkv: Product
    output: Product
    mlp_gain: Tensor
    gate_up: Product
    down: Product


def runs_as_llama(body: Any) -> bool:
    """Whether `LlamaBody` computes what this transformers model computes."""
    if type(body) is not LlamaModel:
        return False
    config, weight = body.config, body.embed_tokens.weight
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] not in _CHANGING_ROPES
    )


class LlamaBody:
    """A Llama without its head.

    Attributes:
        weight_bytes: bytes of weights that a pass reads, the embedding's rows left out.
    """

    def __init__(self, body: Any, layout: Layout) -> None:
        """Take over the weights of a `LlamaModel` that `runs_as_llama`, and use the model up.

        Its layers are taken from it one by one, so that no second copy of the weights is made.
        """
        config = body.config
        self._head_dim = int(body.layers[0].self_attn.head_dim)
        self._num_kv_heads = int(config.num_key_value_heads)
        self._num_heads = int(config.num_attention_heads)
        # ‖x‖² + hε instead of mean x² + ε, for `_norm`
        self._root_size = config.hidden_size**0.5
        self._root_epsilon = torch.tensor(self._root_size * config.rms_norm_eps**0.5)
        self._embedding: Tensor = body.embed_tokens.weight.detach()
        self._last_gain = self._gain(body.norm)
        self._layers: list[LlamaLayer] = []
        self.weight_bytes = 0
        while len(body.layers):
            self._layers.append(self._take_over(body.layers.pop(0), layout))
        self._rotary = body.rotary_emb
        self._cos = self._sin = torch.empty(0, 1, self._head_dim)

    def forward(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Run int64[n] behind what `cache` holds; float32[n, hidden] after the last norm."""
        past, size = cache.length, input_ids.shape[0]
        rotation = self._rotation(past, past + size)
        mask = None if size == 1 else self._mask(past, size)
        x = F.embedding(input_ids, self._embedding)
        for index, layer in enumerate(self._layers):
            rows = layer.qkv(self._norm(x, layer.attention_gain))
            x = x + layer.output(self._attention(rows, rotation, mask, cache, index))
            gate, up = layer.gate_up(self._norm(x, layer.mlp_gain)).chunk(2, dim=1)
            x = x + layer.down(F.silu(gate) * up)
        return self._norm(x, self._last_gain)

    def _gain(self, norm: Any) -> Tensor:
        gain: Tensor = norm.weight.detach() * self._root_size
        return gain

    def _take_over(self, layer: Any, layout: Layout) -> LlamaLayer:
        attention, mlp = layer.self_attn, layer.mlp
        taken = LlamaLayer(
            attention_gain=self._gain(layer.input_layernorm),
            qkv=layout([attention.q_proj, attention.k_proj, attention.v_proj]),
            output=layout([attention.o_proj]),
            mlp_gain=self._gain(layer.post_attention_layernorm),
            gate_up=layout([mlp.gate_proj, mlp.up_proj]),
            down=layout([mlp.down_proj]),
        )
        for product in (taken.qkv, taken.output, taken.gate_up, taken.down):
            self.weight_bytes += product.num_bytes
        return taken

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """n(x) as (g√h ∘ x) / √(‖x‖² + hε), in half the time of torch's rms_norm."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * gain / torch.hypot(length, self._root_epsilon)

    def _attention(
        self,
        qkv: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache,
        index: int,
    ) -> Tensor:
        """float32[n, heads·d] from float32[n, (heads + 2·kv_heads)·d], appending to the cache."""
        size, dim, num_kv = qkv.shape[0], self._head_dim, self._num_kv_heads
        heads = qkv.view(size, -1, dim)
        turned = _rotate(heads[:, :-num_kv], *rotation)
        keys, values = cache.states.update(
            turned[:, self._num_heads :].transpose(0, 1)[None],
            heads[:, -num_kv:].transpose(0, 1)[None],
            index,
        )
        queries = turned[:, : self._num_heads].view(size, num_kv, -1, dim).transpose(0, 1)
        mixed = F.scaled_dot_product_attention(
            queries.reshape(1, num_kv, -1, dim), keys, values, attn_mask=mask
        )
        return mixed.view(num_kv, size, -1, dim).transpose(0, 1).reshape(size, -1)

    def _mask(self, past: int, size: int) -> Tensor:
        """float32[n·g, past + n]: 0 where a query sees a key, −∞ where it does not; the g queries
        of a position follow each other."""
        future = torch.full((size, past + size), -torch.inf).triu_(past + 1)
        return future.repeat_interleave(self._num_heads // self._num_kv_heads, dim=0)

    def _rotation(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """float32[n, 1, d] twice: cos mθ, and sin mθ with the sign that `_rotate` needs."""
        if end > self._cos.shape[0]:
            positions = torch.arange(-(-end // _ROPE_BLOCK) * _ROPE_BLOCK)[None]
            cos, sin = self._rotary(self._embedding, positions)
            sin[..., : self._head_dim // 2].neg_()
            self._cos, self._sin = cos[0, :, None], sin[0, :, None]
        return self._cos[begin:end], self._sin[begin:end]


def _rotate(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """RoPE of float32[n, heads, d]."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), signed_sin)
