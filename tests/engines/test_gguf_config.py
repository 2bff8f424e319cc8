"""What GGUF files say about RoPE and transformers does not read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from bus.protocol.errors import ModelError
from engines.torch.gguf_config import read_gguf_config
from engines.torch.linears import integer
from engines.torch.loading import load_model
from engines.torch.network import CausalNetwork
from engines.torch.rope import rope_frequencies
from tests.engines.families import llama31_rope
from tests.engines.test_families import IDS, in_passes
from tests.engines.tiny import byte_level_tokenizer, random_model, save_tiny_gguf, tiny_llama

NUM_TOKENS = len(byte_level_tokenizer())


def llama31() -> Any:
    return random_model(
        LlamaForCausalLM, vocab_size=NUM_TOKENS, rope_theta=500000.0,
        rope_scaling=llama31_rope(8192), tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip


def factors(model: Any) -> torch.Tensor:
    """float32[d/2]: what llama.cpp divides the angles by."""
    scaled, _ = rope_frequencies(model.config)
    exponents = torch.arange(0, 16, 2, dtype=torch.float32) / 16
    return 1.0 / 500000.0**exponents / scaled


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_rope_scaling_of_a_llama_31_comes_along(dtype: str, tmp_path: Path) -> None:
    model = llama31()
    spec = save_tiny_gguf(
        tmp_path / "tiny.gguf", model,
        also=lambda writer: writer.add_tensor("rope_freqs.weight", factors(model).numpy()),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "tiny")
    byte_level_tokenizer().save_pretrained(tmp_path / "tiny")
    loaded = [load_model(str(place), dtype, "cpu") for place in (spec, tmp_path / "tiny")]
    for each in loaded:
        assert each.model.config.rope_parameters == {**llama31_rope(8192), "rope_theta": 500000.0}
    got, wanted = (in_passes(CausalNetwork(x.model, NUM_TOKENS, integer), [60]) for x in loaded)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert len(IDS) == len(got)


def test_a_file_without_scaling_has_plain_angles(tmp_path: Path) -> None:
    config = read_gguf_config(save_tiny_gguf(tmp_path / "tiny.gguf"))
    assert config.rope_parameters["rope_type"] == "default"


def other_factors(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", torch.linspace(1, 8, 4).numpy())


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    ("also", "reason"),
    [
        (other_factors, "rope_freqs.weight is not the RoPE scaling of Llama 3.1"),
        (yarn, "RoPE scaled by 'yarn' is not read from GGUF files"),
    ],
)
def test_other_scalings_are_refused(
    also: Callable[[gguf.GGUFWriter], None], reason: str, dtype: str, tmp_path: Path
) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf", tiny_llama(NUM_TOKENS), also=also)
    with pytest.raises(ModelError) as refused:
        load_model(str(path), dtype, "cpu")
    assert str(refused.value) == (
        f"tiny.gguf cannot be run: {reason}; use the model's own directory or its Hugging Face id"
    )


def test_a_gemma_2_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(
        AutoConfig, "from_pretrained",
        lambda *args, **options: SimpleNamespace(model_type="gemma2"),
    )  # fmt: skip
    with pytest.raises(ModelError, match="does not hold Gemma 2's query scaling; use the model's"):
        read_gguf_config(path)
