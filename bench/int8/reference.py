"""A Llama or Qwen2 in plain float32, one layer in memory at a time.

What int8 is compared with: the same weights, read from where the conversion reads them, in torch's
own operations. All texts run through a layer before the next one is read, so that a model of 6 GB
in float32 needs the memory of its embedding. Knows neither caches nor sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bus.protocol.errors import ConfigurationError, ModelError
from engines.catalog.registry import split_head
from engines.catalog.sources import find_source
from engines.torch.conversion import read_config, weights_of
from engines.torch.converted import on_disk
from engines.torch.draft import is_trimmed, read_trimmed, trimmed_location
from engines.torch.llama import has_llama_config
from engines.torch.weights import MappedWeights, Weights


@dataclass(frozen=True, slots=True)
class Reference:
    """A model's float32 weights, read when they are needed.

    Attributes:
        config: transformers' config, one that `engines.torch.llama.has_llama_config`.
        narrow_head: float32[H, hidden], where the head is not the model's own.
    """

    config: Any
    weights: Weights
    narrow_head: Tensor | None = None

    @torch.inference_mode()
    def hidden_states(
        self, texts: Sequence[Tensor], tick: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """float32[n, hidden] after the last norm, for each text: int64[n], n ≥ 1.

        Args:
            tick: called after each layer, for a progress bar.

        Raises:
            ModelError: a tensor is missing.
        """
        embedding = self._needed("model.embed_tokens.weight")
        states = [F.embedding(text, embedding) for text in texts]
        del embedding
        rotary = LlamaRotaryEmbedding(self.config)
        for index in range(self.config.num_hidden_layers):
            layer = _Layer(self.config, self._layer(index), rotary)
            states = [layer.forward(x) for x in states]
            tick()
        gain = self._needed("model.norm.weight")
        return [_norm(x, gain, self.config) for x in states]

    def head(self) -> Tensor:
        """float32[H, hidden], all rows.

        Raises:
            ModelError: the model has none.
        """
        if self.narrow_head is not None:
            return self.narrow_head
        own = self.weights.get("lm_head.weight")
        return self._needed("model.embed_tokens.weight") if own is None else own

    def _layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer by their names in it."""
        tensors = {}
        for name in _NORMS:
            tensors[f"{name}.weight"] = self._needed(f"model.layers.{index}.{name}.weight")
        for name in _MATRICES:
            prefix = f"model.layers.{index}.{name}"
            tensors[f"{name}.weight"] = self._needed(f"{prefix}.weight")
            bias = self.weights.get(f"{prefix}.bias")
            if bias is not None:
                tensors[f"{name}.bias"] = bias
        return tensors

    def _needed(self, name: str) -> Tensor:
        tensor = self.weights.get(name)
        if tensor is None:
            raise ModelError(
                f"the model has no weights {name!r}; expected a Llama or Qwen2, as its config says"
            )
        return tensor


_ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
_MLP = tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
_MATRICES = _ATTENTION + _MLP
_NORMS = ("input_layernorm", "post_attention_layernorm")


class _Layer:
    def __init__(self, config: Any, tensors: dict[str, Tensor], rotary: Any) -> None:
        self._config, self._tensors, self._rotary = config, tensors, rotary
        self._num_heads = int(config.num_attention_heads)
        self._num_kv_heads = int(config.num_key_value_heads)

    def forward(self, x: Tensor) -> Tensor:
        """float32[n, hidden] of a whole text → the same after this layer."""
        x = x + self._attention(self._norm("input_layernorm", x))
        rows = self._norm("post_attention_layernorm", x)
        gate, up = self._product("mlp.gate_proj", rows), self._product("mlp.up_proj", rows)
        return x + self._product("mlp.down_proj", F.silu(gate) * up)

    def _attention(self, rows: Tensor) -> Tensor:
        """Causal, of float32[n, hidden]."""
        size = rows.shape[0]
        query, key, value = (
            self._product(f"self_attn.{part}_proj", rows).view(size, heads, -1).transpose(0, 1)
            for part, heads in zip(
                "qkv", (self._num_heads, self._num_kv_heads, self._num_kv_heads), strict=True
            )
        )
        cos, sin = self._rotary(rows, torch.arange(size)[None])
        mixed = F.scaled_dot_product_attention(
            _rotated(query, cos[0], sin[0])[None], _rotated(key, cos[0], sin[0])[None],
            value[None], is_causal=True, enable_gqa=self._num_heads != self._num_kv_heads,
        )[0]  # fmt: skip
        return self._product("self_attn.o_proj", mixed.transpose(0, 1).reshape(size, -1))

    def _product(self, name: str, rows: Tensor) -> Tensor:
        return F.linear(rows, self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return _norm(x, self._tensors[f"{name}.weight"], self._config)


def _norm(x: Tensor, gain: Tensor, config: Any) -> Tensor:
    return gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of float32[heads, n, d]; cos and sin: float32[n, d]."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def float_model(spec: str) -> Reference:
    """The float32 weights of a target's spec, or of a draft that is a whole model.

    Raises:
        ModelError: no such model, or one without float weights.
        ConfigurationError: it is neither a Llama nor a Qwen2.
    """
    source = on_disk(find_source(spec))
    config = read_config(source)
    if not has_llama_config(config):
        raise ConfigurationError(
            f"{source.name} is a {config.model_type}; int8 is compared with float32 for Llama and "
            "Qwen2 models alone: choose such a model"
        )
    return Reference(config, weights_of(source, config))


def float_draft(spec: str) -> Reference:
    """The float32 weights of a draft's spec; `@V` does not count, the head has all its rows.

    Raises:
        ModelError, ConfigurationError: as `float_model`; or a trimmed draft does not fit.
    """
    if not is_trimmed(spec):
        return float_model(split_head(spec)[0])
    body, head, _ = read_trimmed(*trimmed_location(spec), torch.float32)
    return Reference(body.config, MappedWeights(body.state_dict(), prefix="model."), head)
