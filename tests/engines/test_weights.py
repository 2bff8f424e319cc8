from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bus.protocol.errors import ModelError
from engines.torch.gguf_weights import GgufWeights
from engines.torch.weights import DirectoryWeights, MappedWeights, Weights
from tests.engines.tiny import byte_level_tokenizer, save_tiny_gguf, tiny_llama, tiny_qwen2

NUM_TOKENS = len(byte_level_tokenizer())


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_every_place_gives_the_tensors_of_the_model(make: Any, tmp_path: Path) -> None:
    model = make(NUM_TOKENS)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    path = save_tiny_gguf(tmp_path / "tiny.gguf", model)
    state = model.state_dict()
    places: list[Weights] = [
        MappedWeights(state), DirectoryWeights(tmp_path / "whole"),
        DirectoryWeights(tmp_path / "shards"), GgufWeights(path, model.config),
    ]  # fmt: skip
    for weights in places:
        for name, tensor in state.items():
            if name != "lm_head.weight":  # tied
                found = weights.get(name)
                assert found is not None
                assert torch.equal(found, tensor), name
        assert weights.get("model.layers.0.self_attn.no_such.weight") is None
        assert weights.get("nonsense") is None


def test_names_get_a_prefix_and_numbers_become_float32() -> None:
    weights = MappedWeights({"a": torch.ones(2, dtype=torch.float16)}, prefix="model.")
    found = weights.get("model.a")
    assert found is not None
    assert found.dtype == torch.float32
    assert weights.get("a") is None


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected weights as safetensors"):
        DirectoryWeights(tmp_path)
