"""The forward pass of a Llama or Qwen2 as one plain function of a few operations.

transformers' module tree spends about as long in Python as a small model's weights need from
memory. This is the same arithmetic on the same weights and the same cache, for one session at a
time (no batch, no padding):

    x ← x + O·attention(RoPE(Q·n(x)), RoPE(K·n(x)), V·n(x))        n(x) = g ∘ x / √(mean x² + ε)
    x ← x + D·(silu(G·n(x)) ∘ (U·n(x)))

with RoPE(v) = v ∘ cos mθ + swap(v) ∘ (−sin mθ, sin mθ) at position m, where swap exchanges a head's
halves (Su et al. 2021, in the order of Llama's published weights). Grouped-query heads are not
repeated: the g queries that share a key head are g rows of one attention.

Two bodies, for a CPU. `FloatBody` runs float32 as fast as torch's operations allow. `IntegerBody`
runs `models.integer` products between operations of `models.rowwise`, so that a token's result is
bitwise the same however the tokens are cut into passes.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from models import rowwise
from models.cache import KVCache
from models.integer import IntegerProduct, Packed, product
from models.integer_decoder import IntegerDecoder, IntegerLayer
from models.linears import Layout, Product
from models.rowwise import scripted

_CHANGING_ROPES = ("dynamic", "longrope")  # their angles depend on the length run so far
_ROPE_BLOCK = 512  # positions of the rotation table computed at a time


@dataclass(frozen=True, slots=True)
class Layer:
    """The products of one layer."""

    qkv: Product
    output: Product
    gate_up: Product
    down: Product


@dataclass(frozen=True, slots=True)
class Gains:
    """The gains of one layer's norms, g√h: float32[hidden]."""

    attention: Tensor
    mlp: Tensor


def has_llama_config(config: Any) -> bool:
    """Whether the bodies here compute what a transformers model of this config computes."""
    return (
        config.model_type in ("llama", "qwen2")
        and config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] not in _CHANGING_ROPES
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
    )


def runs_as_llama(body: Any) -> bool:
    """Whether `FloatBody` computes what this transformers model computes."""
    if type(body) not in (LlamaModel, Qwen2Model):
        return False
    weight = body.embed_tokens.weight
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and has_llama_config(body.config)
    )


class Rotation:
    """RoPE's table, made as far as positions are asked for."""

    def __init__(self, config: Any) -> None:
        rotary = LlamaRotaryEmbedding(config)
        self._frequencies = rotary.inv_freq.float()
        self._scaling = float(rotary.attention_scaling)
        self._cos = self._sin = torch.empty(0, 1, 2 * len(self._frequencies))

    def at(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """float32[n, 1, d] twice for positions begin … end−1: cos mθ, and sin mθ with its sign."""
        if end > self._cos.shape[0]:
            positions = torch.arange(-(-end // _ROPE_BLOCK) * _ROPE_BLOCK, dtype=torch.float32)
            angles = (positions[:, None] * self._frequencies).double().numpy()
            # numpy: torch's float32 cosine has other last bits where threads cut the table
            cos = torch.from_numpy(np.cos(angles)).float() * self._scaling
            sin = torch.from_numpy(np.sin(angles)).float() * self._scaling
            self._cos = torch.cat((cos, cos), dim=1)[:, None]
            self._sin = torch.cat((-sin, sin), dim=1)[:, None]
        return self._cos[begin:end], self._sin[begin:end]


class LlamaBody:
    """What both bodies share: a model without its head.

    Attributes:
        weight_bytes: bytes of weights that a pass reads, the embedding's rows left out.
    """

    def __init__(self, config: Any) -> None:
        self._num_kv_heads = int(config.num_key_value_heads)
        self._num_heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None)
        self._head_dim = int(head_dim or config.hidden_size // self._num_heads)
        self._rotation = Rotation(config)
        self.weight_bytes = 0


class FloatBody(LlamaBody):
    """In float32, several queries in one attention."""

    def __init__(self, body: Any, layout: Layout) -> None:
        """Take over the weights of a model that `runs_as_llama`, and use the model up.

        Its layers are taken from it one by one, so that no second copy of the weights is made.
        """
        config = body.config
        super().__init__(config)
        # ‖x‖² + hε instead of mean x² + ε, for `_norm`
        self._root_size = config.hidden_size**0.5
        self._root_epsilon = torch.tensor(self._root_size * config.rms_norm_eps**0.5)
        self._embedding: Tensor = body.embed_tokens.weight.detach()
        self._last_gain = self._gain(body.norm)
        self._gains: list[Gains] = []
        self._layers: list[Layer] = []
        while len(body.layers):
            self._take_over(body.layers.pop(0), layout)

    def forward(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Run int64[n] after what `cache` holds; float32[n, hidden] after the last norm."""
        past, size = cache.length, input_ids.shape[0]
        rotation = self._rotation.at(past, past + size)
        mask = None if size == 1 else self._mask(past, size)
        x = F.embedding(input_ids, self._embedding)
        for index, (layer, gains) in enumerate(zip(self._layers, self._gains, strict=True)):
            rows = layer.qkv(self._norm(x, gains.attention))
            x = x + layer.output(self._attention(rows, rotation, mask, cache, index))
            gate, up = layer.gate_up(self._norm(x, gains.mlp)).chunk(2, dim=1)
            x = x + layer.down(F.silu(gate) * up)
        return self._norm(x, self._last_gain)

    def _gain(self, norm: Any) -> Tensor:
        gain: Tensor = norm.weight.detach() * self._root_size
        return gain

    def _take_over(self, layer: Any, layout: Layout) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._gains.append(
            Gains(self._gain(layer.input_layernorm), self._gain(layer.post_attention_layernorm))
        )
        self._add(
            Layer(
                qkv=layout([attention.q_proj, attention.k_proj, attention.v_proj]),
                output=layout([attention.o_proj]),
                gate_up=layout([mlp.gate_proj, mlp.up_proj]),
                down=layout([mlp.down_proj]),
            )
        )

    def _add(self, layer: Layer) -> None:
        self._layers.append(layer)
        for part in (layer.qkv, layer.output, layer.gate_up, layer.down):
            self.weight_bytes += part.num_bytes

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """float32[n, (heads + 2·kv_heads)·d] → queries and keys, values: float32[n, …, d]."""
        heads = qkv.view(qkv.shape[0], -1, self._head_dim)
        return heads[:, : -self._num_kv_heads], heads[:, -self._num_kv_heads :]

    def _store(
        self, turned: Tensor, values: Tensor, cache: KVCache, index: int
    ) -> tuple[Tensor, Tensor]:
        """Append a layer's rotated keys and its values; float32[1, kv_heads, L, d] of all."""
        held: tuple[Tensor, Tensor] = cache.states.update(
            turned[:, self._num_heads :].transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            index,
        )
        return held

    def _queries(self, turned: Tensor) -> Tensor:
        """float32[n, kv_heads, g, d]."""
        size = turned.shape[0]
        return turned[:, : self._num_heads].view(size, self._num_kv_heads, -1, self._head_dim)

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
        plain, values = self._split(qkv)
        turned = _rotate(plain, *rotation)
        keys, values = self._store(turned, values, cache, index)
        queries = self._queries(turned).transpose(0, 1).reshape(1, num_kv, -1, dim)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return mixed.view(num_kv, size, -1, dim).transpose(0, 1).reshape(size, -1)

    def _mask(self, past: int, size: int) -> Tensor:
        """float32[n·g, past + n]: 0 where a query sees a key, −∞ where it does not; the g queries
        of a position follow each other."""
        future = torch.full((size, past + size), -torch.inf).triu_(past + 1)
        return future.repeat_interleave(self._num_heads // self._num_kv_heads, dim=0)


@scripted
def _before_attention(
    x: Tensor,
    qkv: list[Packed],
    bias: Tensor | None,
    epsilon: float,
    cos: Tensor,
    signed_sin: Tensor,
    head_dim: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys, float32[n, heads + kv_heads, d], and values, float32[n, kv_heads,
    d], of float32[n, hidden]."""
    rows = product(rowwise.normalised(x, epsilon), qkv, bias)
    heads = rows.view(x.shape[0], -1, head_dim)
    turned = rowwise.rotated(heads[:, :-num_kv_heads], cos, signed_sin)
    return turned, heads[:, -num_kv_heads:]


@scripted
def _attention(
    turned: Tensor, values: Tensor, key_block: Tensor, value_block: Tensor, past: int
) -> Tensor:
    """float32[n, heads·d]; writes keys and values into a layer's blocks at `past`."""
    size, num_kv_heads, head_dim = values.shape
    end = past + size
    key_block[0, :, past:end] = turned[:, -num_kv_heads:].transpose(0, 1)
    value_block[0, :, past:end] = values.transpose(0, 1)
    queries = turned[:, :-num_kv_heads].reshape(size, num_kv_heads, -1, head_dim)
    return rowwise.attention(queries, key_block, value_block, past)


@scripted
def _after_attention(
    x: Tensor,
    mixed: Tensor,
    output: list[Packed],
    output_bias: Tensor | None,
    gate_up: list[Packed],
    gate_up_bias: Tensor | None,
    down: list[Packed],
    down_bias: Tensor | None,
    epsilon: float,
) -> Tensor:
    """float32[n, hidden] after a layer."""
    x = x + product(mixed, output, output_bias)
    both = product(rowwise.normalised(x, epsilon), gate_up, gate_up_bias)
    return x + product(rowwise.gated(both), down, down_bias)


def _products(layer: IntegerLayer) -> list[IntegerProduct]:
    return [IntegerProduct(getattr(layer, part)) for part in IntegerLayer.__slots__]


class IntegerBody(LlamaBody):
    """In int8 products, with every row's result independent of the rows beside it.

    Hidden states are those of `models.integer_decoder`: rotated, norms without gain.
    """

    def __init__(self, decoder: IntegerDecoder) -> None:
        super().__init__(decoder.config)
        self._epsilon = float(decoder.config.rms_norm_eps)
        self._embedding = decoder.embedding
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # packing lets go of the GIL
            self._products = list(pool.map(_products, decoder.layers))
        self.weight_bytes = sum(part.num_bytes for layer in self._products for part in layer)

    def forward(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Run int64[n] after what `cache` holds; float32[n, hidden] after the last norm."""
        past, size = cache.length, input_ids.shape[0]
        cos, sin = self._rotation.at(past, past + size)
        x = F.embedding(input_ids, self._embedding).float()
        for index, (qkv, output, gate_up, down) in enumerate(self._products):
            turned, values = _before_attention(
                x, qkv.groups, qkv.bias, self._epsilon, cos, sin, self._head_dim,
                self._num_kv_heads,
            )  # fmt: skip
            keys_values = cache.layer(index).extended(size, values)
            with rowwise.one_thread():
                mixed = _attention(turned, values, *keys_values, past)
            x = _after_attention(
                x, mixed, output.groups, output.bias, gate_up.groups, gate_up.bias, down.groups,
                down.bias, self._epsilon,
            )  # fmt: skip
        return rowwise.normalised(x, self._epsilon)


def _rotate(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """RoPE of float32[n, heads, d]."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), signed_sin)
