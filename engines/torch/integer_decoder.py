"""A Llama or Qwen2 in int8: converted from float32 layer by layer, and kept as a directory.

Two changes leave what the model computes as it is, but for rounding:

* The norms' gains are folded into the matrices after them, the last norm's into the head.
* The hidden state is rotated (`engines.torch.rotation`): embedding E·Q, matrices that read it W·Q,
  that write it Qᵀ·W; likewise each head's values between value and output projection.

A directory holds `integer.safetensors` (matrices as `engines.torch.integer` keeps them; the
embedding as float16, of which only the rows of the tokens are read), config and tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from bus.protocol.errors import ModelError
from engines.torch.integer import IntegerMatrix
from engines.torch.rotation import rotate
from engines.torch.weights import Weights

INTEGER_WEIGHTS = "integer.safetensors"
FORMAT = "int8-v4"
"""Raised when converted copies must look different."""


@dataclass(frozen=True, slots=True)
class IntegerLayers:
    """The matrices of all layers; those that the same rows run through are one."""

    qkv: IntegerMatrix
    output: IntegerMatrix
    gate_up: IntegerMatrix
    down: IntegerMatrix


@dataclass(frozen=True, slots=True)
class IntegerDecoder:
    """A converted model.

    Attributes:
        config: transformers' config.
        embedding: float16[V, hidden], rotated.
        head: of the logits.
        vocab: int32[H], rising: the token of each head row; None where row and id are the same.
    """

    config: Any
    embedding: Tensor
    layers: IntegerLayers
    head: IntegerMatrix
    vocab: Tensor | None = None

    def save(self, directory: Path) -> None:
        """Write the weights and the config."""
        tensors = {"embedding": self.embedding}
        if self.vocab is not None:
            tensors["vocab"] = self.vocab
        for name, matrix in self._matrices().items():
            tensors[f"{name}.weight"] = matrix.weight
            tensors[f"{name}.scale"] = matrix.scale
            tensors[f"{name}.bias"] = matrix.bias
            tensors[f"{name}.shape"] = torch.tensor(matrix.shape)
        save_file(tensors, directory / INTEGER_WEIGHTS)
        self.config.save_pretrained(directory)

    @classmethod
    def load(cls, directory: Path) -> IntegerDecoder:
        """Read what `save` wrote.

        Raises:
            ModelError: the directory is damaged.
        """
        try:
            config = read_converted_config(directory)
            tensors = load_file(directory / INTEGER_WEIGHTS)
            layers = IntegerLayers(*(_matrix(tensors, part) for part in IntegerLayers.__slots__))
            head, vocab = _matrix(tensors, "head"), tensors.get("vocab")
            return cls(config, tensors["embedding"], layers, head, vocab)
        except Exception as error:  # the readers of both files can raise anything
            raise ModelError(
                f"cannot read the converted model in {directory}: {error}; delete the directory, "
                "and it is converted again"
            ) from error

    def narrowed(self, vocab: Tensor) -> IntegerDecoder:
        """The same model with a head of the tokens int32[H], rising, alone."""
        return replace(self, head=self.head.rows(vocab.long()), vocab=vocab)

    def _matrices(self) -> dict[str, IntegerMatrix]:
        parts = {part: getattr(self.layers, part) for part in IntegerLayers.__slots__}
        return {"head": self.head, **parts}


def read_converted_config(directory: Path) -> Any:
    """The config that `IntegerDecoder.save` wrote, as transformers' base class: it holds every
    value, and the class of its own model type takes longer to import than the weights to read."""
    config = json.loads((directory / "config.json").read_text("utf-8"))
    return PreTrainedConfig.from_dict(config)


def convert(
    config: Any, weights: Weights, head: Tensor | None = None, vocab: Tensor | None = None
) -> IntegerDecoder:
    """Convert a model of a config that `engines.torch.llama.has_llama_config`.

    Args:
        head: float32[H, hidden], in place of the model's own rows.
        vocab: int32[H], the tokens of those rows, where they are not all.

    Raises:
        ModelError: a tensor is missing.
    """
    embedding = _needed(weights, "model.embed_tokens.weight")
    if head is None:
        head = weights.get("lm_head.weight")
        head = embedding if head is None else head
    last_gain = _needed(weights, "model.norm.weight")
    converted_head = _reading([head], last_gain)
    rotated = rotate(embedding).half()
    del embedding, head
    layers = [_layer(config, weights, index) for index in range(config.num_hidden_layers)]
    stacked = IntegerLayers(
        *(IntegerMatrix.stacked([layer.pop(0) for layer in layers]) for _ in layers[0].copy())
    )
    return IntegerDecoder(config, rotated, stacked, converted_head, vocab)


def _layer(config: Any, weights: Weights, index: int) -> list[IntegerMatrix]:
    """The matrices in the order of `IntegerLayers`."""
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    gain = _needed(weights, f"{prefix}.input_layernorm.weight")
    names = [f"{attention}.{part}_proj" for part in ("q", "k", "v")]
    matrices = [_needed(weights, f"{name}.weight") for name in names]
    biases = [weights.get(f"{name}.bias") for name in names]
    head_dim = matrices[2].shape[0] // config.num_key_value_heads
    matrices[2] = _rotated_heads(matrices[2].T, head_dim).T
    if biases[2] is not None:
        biases[2] = _rotated_heads(biases[2], head_dim)
    output = _rotated_heads(_needed(weights, f"{attention}.o_proj.weight"), head_dim)
    gated = [f"{mlp}.{part}_proj" for part in ("gate", "up")]
    mlp_gain = _needed(weights, f"{prefix}.post_attention_layernorm.weight")
    return [
        _reading(matrices, gain, biases),
        _writing(output, weights.get(f"{attention}.o_proj.bias")),
        _reading(
            [_needed(weights, f"{name}.weight") for name in gated], mlp_gain,
            [weights.get(f"{name}.bias") for name in gated],
        ),
        _writing(
            _needed(weights, f"{mlp}.down_proj.weight"), weights.get(f"{mlp}.down_proj.bias")
        ),
    ]  # fmt: skip


def _reading(
    matrices: list[Tensor], gain: Tensor, biases: Sequence[Tensor | None] = (None,)
) -> IntegerMatrix:
    """Matrices that read the hidden state after a norm, (W ∘ g)·Q, one beside the other."""
    given = [bias for bias in biases if bias is not None]  # all have one or none
    turned = torch.cat([rotate(matrix * gain) for matrix in matrices])
    return IntegerMatrix.of(turned, torch.cat(given) if given else None)


def _writing(matrix: Tensor, bias: Tensor | None) -> IntegerMatrix:
    """A matrix that writes the hidden state: Qᵀ·W, bias included."""
    return IntegerMatrix.of(rotate(matrix.T).T, None if bias is None else rotate(bias))


def _rotated_heads(rows: Tensor, head_dim: int) -> Tensor:
    """Rotate each head of float32[…, heads·d] by itself."""
    return rotate(rows.reshape(*rows.shape[:-1], -1, head_dim)).reshape(rows.shape)


def _needed(weights: Weights, name: str) -> Tensor:
    tensor = weights.get(name)
    if tensor is None:
        raise ModelError(f"the model has no weights {name!r}; it is not the Llama its config says")
    return tensor


def _matrix(tensors: dict[str, Tensor], name: str) -> IntegerMatrix:
    num_out, num_in = tensors[f"{name}.shape"].tolist()
    weight, scale, bias = (tensors[f"{name}.{part}"] for part in ("weight", "scale", "bias"))
    return IntegerMatrix(weight, scale, bias, (num_out, num_in))
