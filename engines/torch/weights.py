"""Weights read one matrix at a time, under transformers' names, from wherever they are.

A conversion needs one layer in float32 at a time; loading a whole model in float32 first would
take four times the memory of the result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from torch import Tensor

from bus.protocol.errors import ModelError

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
