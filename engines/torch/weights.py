"""Weights read one matrix at a time, under transformers' names, from wherever they are.

A conversion needs one layer in float32 at a time; loading a whole model in float32 first would
take four times the memory of the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import gguf
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

from bus.protocol.errors import ModelError
from engines.torch.gguf_tokenizer import read_gguf

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Weights(Protocol):
    """float32 tensors by name, such as `model.layers.0.mlp.up_proj.weight`."""

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None where the model has none of that name."""
        ...


class MappedWeights:
    """The tensors of a state dict; `prefix` is put before its names."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        self._state = {prefix + name: tensor for name, tensor in state.items()}

    def get(self, name: str) -> Tensor | None:
        tensor = self._state.get(name)
        return None if tensor is None else tensor.detach().float()


class DirectoryWeights:
    """A transformers directory of safetensors, in one file or several."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelError where the directory holds none."""
        index = directory / _INDEX
        if index.is_file():
            names: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            self._files = {name: directory / file for name, file in names.items()}
        elif (directory / _SINGLE).is_file():
            with safe_open(directory / _SINGLE, "pt") as file:
                self._files = dict.fromkeys(file.keys(), directory / _SINGLE)
        else:
            raise ModelError(f"{directory} holds no {_SINGLE}; expected weights as safetensors")

    def get(self, name: str) -> Tensor | None:
        path = self._files.get(name)
        if path is None:
            return None
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.float()


class GgufWeights:
    """A GGUF file, dequantised tensor by tensor.

    Args:
        config: transformers' config of the model.
    """

    def __init__(self, path: Path, config: Any) -> None:
        reader = read_gguf(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = next(
            key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type
        )
        self._names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        processor = TENSOR_PROCESSORS.get(config.model_type)
        self._process: Callable[..., Any] | None = None
        if processor is not None:  # llama.cpp interleaves the halves of a Llama's heads
            self._process = processor(config=config.to_dict()).process

    def get(self, name: str) -> Tensor | None:
        stored = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        found = None if stored is None else self._tensors.get(stored)
        if found is None:
            return None
        plain = gguf.dequantize(found.data, found.tensor_type)
        if self._process is not None:
            plain = self._process(weights=plain, name=stored).weights
        return torch.tensor(plain, dtype=torch.float32)
