from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bus.protocol.errors import ConfigurationError, ModelError
from engines.torch import precision
from engines.torch.loading import load_causal_lm
from engines.torch.precision import resolve_device, resolve_dtype
from tests.engines.tiny import CONTEXT_LENGTH, byte_level_tokenizer, save_tiny

CPU = torch.device("cpu")


def test_a_directory_loads_with_all_that_workers_ask(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_level_tokenizer()
    loaded = load_causal_lm(str(save_tiny(tmp_path / "tiny", tokenizer)), "float32", "cpu")
    assert loaded.name == "tiny"
    assert loaded.context_length == CONTEXT_LENGTH
    assert loaded.eos_tokens == {tokenizer.eos_token_id}
    assert next(loaded.model.parameters()).dtype == torch.float32
    assert not loaded.model.training
    assert capfd.readouterr().err.count("Loading weights") == 0


def test_vocabularies_that_differ_only_in_padding_fit(tmp_path: Path) -> None:
    narrow = load_causal_lm(str(save_tiny(tmp_path / "a", padding=0)), "float32", "cpu")
    wide = load_causal_lm(str(save_tiny(tmp_path / "b", padding=30)), "float32", "cpu")
    assert wide.model.config.vocab_size == narrow.model.config.vocab_size + 30
    assert wide.vocab_size == narrow.vocab_size == len(byte_level_tokenizer())
    assert wide.tokenizer_digest == narrow.tokenizer_digest


def test_a_real_mismatch_shows_in_the_digest(tmp_path: Path) -> None:
    small = byte_level_tokenizer(vocab_size=280)
    one = load_causal_lm(str(save_tiny(tmp_path / "a", small)), "float32", "cpu")
    other = load_causal_lm(str(save_tiny(tmp_path / "b")), "float32", "cpu")
    assert one.tokenizer_digest != other.tokenizer_digest


def test_a_model_without_a_context_length_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "tiny")
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = 0
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="context length"):
        load_causal_lm(str(directory), "float32", "cpu")


# --- precision --------------------------------------------------------------------------------


def test_auto_takes_bfloat16_exactly_where_the_hardware_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda device: True)
    assert resolve_dtype("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda device: False)
    assert resolve_dtype("auto", CPU) == torch.float32


def test_float32_switches_shortened_products_off() -> None:
    torch.set_float32_matmul_precision("high")
    assert resolve_dtype("float32", CPU) == torch.float32
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("dtype", ["float16", "", "fp32"])
def test_an_unknown_dtype_lists_the_known(dtype: str) -> None:
    with pytest.raises(ConfigurationError, match="auto, float32, bfloat16"):
        resolve_dtype(dtype, CPU)


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:x", ""])
def test_an_unknown_device_lists_the_known(device: str) -> None:
    with pytest.raises(ConfigurationError, match="auto, cpu, cuda"):
        resolve_device(device)


def test_cuda_without_a_gpu_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False))
    with pytest.raises(ConfigurationError, match="sees no GPU"):
        resolve_device("cuda")
    assert resolve_device("auto") == CPU
