"""The config of a GGUF file, with what transformers leaves out of it, or a refusal.

transformers reads sizes and the base of RoPE. It does not read how RoPE is scaled: a Llama 3.1 file
holds a factor for each angle as a tensor, others name a method. It does not know Gemma 2's query
scaling either, which no such file holds. A model that ran without them would be another one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig

from engines.torch.gguf_tokenizer import read_gguf, without_progress
from engines.torch.rope import rope_frequencies
from engines.torch.sources import RefusedError

_FACTORS = "rope_freqs.weight"
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Of Llama 3.1, 3.2 and 3.3, which differ in their factor alone."""


def read_gguf_config(path: Path) -> Any:
    """transformers' config of a GGUF file, its RoPE scaling included.

    Raises:
        RefusedError: the file does not hold all that its model computes, or in a way unknown here.
    """
    with without_progress():
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    reader = read_gguf(path)
    if config.model_type == "gemma2":
        raise _refusal(path, "a GGUF file does not hold Gemma 2's query scaling")
    method = _text(reader, f"{_text(reader, 'general.architecture')}.rope.scaling.type")
    if method not in ("", "none"):
        raise _refusal(path, f"RoPE scaled by {method!r} is not read from GGUF files")
    tensors = [tensor for tensor in reader.tensors if tensor.name == _FACTORS]
    if tensors:
        factors = torch.tensor(gguf.dequantize(tensors[0].data, tensors[0].tensor_type))
        config.rope_parameters = _scaled(config, factors, path)
    return config


def _text(reader: gguf.GGUFReader, name: str) -> str:
    """A field of a file; empty where it has none of that name."""
    field = reader.get_field(name)
    return "" if field is None else str(field.contents())


def _scaled(config: Any, factors: Tensor, path: Path) -> dict[str, Any]:
    """The RoPE parameters of a Llama 3.1 whose angles are divided by float32[d/2] factors."""
    plain, _ = rope_frequencies(config)
    wanted = copy.deepcopy(config)
    theta = config.rope_parameters["rope_theta"]
    wanted.rope_parameters = {**_LLAMA3, "rope_theta": theta, "factor": float(factors.max())}
    found, _ = rope_frequencies(wanted)
    if factors.shape != found.shape or not torch.allclose(plain / factors, found, rtol=1e-4):
        raise _refusal(path, f"{_FACTORS} is not the RoPE scaling of Llama 3.1")
    parameters: dict[str, Any] = wanted.rope_parameters
    return parameters


def _refusal(path: Path, reason: str) -> RefusedError:
    return RefusedError(
        f"{path.name} cannot be run: {reason}; use the model's own directory or its Hugging Face id"
    )
