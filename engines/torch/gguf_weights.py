"""The weights of a GGUF file, under transformers' names.

Apart from `engines.torch.weights`, because both packages that it needs are slow to import.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

from engines.torch.gguf_tokenizer import read_gguf


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
