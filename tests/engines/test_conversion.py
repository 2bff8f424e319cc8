"""Models into int8 from every place they can lie in."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralForCausalLM,
)

from bus.protocol.errors import ConfigurationError, ModelError
from engines.torch import conversion, loading, precision
from engines.torch.cache import KVCache
from engines.torch.converted import load_integer
from engines.torch.draft import load_draft
from engines.torch.integer_decoder import INTEGER_WEIGHTS, IntegerDecoder, convert
from engines.torch.linears import ProductModule, integer
from engines.torch.llama import IntegerBody
from engines.torch.loading import load_causal_lm, load_model
from engines.torch.network import CausalNetwork
from engines.torch.precision import NumberFormat, resolve_format
from engines.torch.probe import probe
from engines.torch.weights import MappedWeights
from tests.engines.tiny import (
    byte_level_tokenizer,
    qwen2_tokenizer,
    random_model,
    save_tiny,
    save_tiny_gguf,
    tiny_llama,
    tiny_qwen2,
)

IDS = torch.arange(3, 43)
NUM_TOKENS = len(byte_level_tokenizer())
CPU = torch.device("cpu")
Make = Callable[[int], Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/e2sci/models"


def copies(own_cache: Path) -> list[str]:
    return sorted(path.name for path in own_cache.iterdir() if path.suffix != ".lock")


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return CausalNetwork(model, NUM_TOKENS, integer).logits(IDS, KVCache(), len(IDS))


@pytest.mark.parametrize(
    ("make", "tokenizer"), [(tiny_llama, byte_level_tokenizer()), (tiny_qwen2, qwen2_tokenizer())]
)
def test_the_same_model_comes_from_memory_directories_shards_and_gguf(
    make: Make, tokenizer: Any, tmp_path: Path
) -> None:
    padding = 14
    model = make(len(tokenizer) + padding)
    wanted = logits(convert(model.config, MappedWeights(model.state_dict())))
    for name, options in (("whole", {}), ("shards", {"max_shard_size": "40KB"})):
        model.save_pretrained(tmp_path / name, **options)
        tokenizer.save_pretrained(tmp_path / name)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    save_tiny_gguf(tmp_path / "tiny.gguf", model, padding, tokenizer)
    for spec in ("whole", "shards", "tiny.gguf"):
        loaded = load_model(str(tmp_path / spec), "int8", "cpu")
        assert isinstance(loaded.model, IntegerDecoder)
        assert loaded.dtype is NumberFormat.INT8
        assert loaded.vocab_size == len(tokenizer)
        assert loaded.eos_tokens == {1}
        assert torch.equal(logits(loaded.model), wanted)


def test_a_model_is_converted_once_and_again_when_a_file_of_it_changes(
    tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    directory = save_tiny(tmp_path / "tiny")
    for _ in range(2):
        load_model(str(directory), "int8", "cpu")
    assert caplog.text.count("converting tiny to int8 once") == 1
    assert len(copies(own_cache)) == 1
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    assert load_model(str(directory), "int8", "cpu").eos_tokens == {1, 5}
    byte_level_tokenizer(280).save_pretrained(directory)
    assert load_model(str(directory), "int8", "cpu").vocab_size == 280
    assert len(copies(own_cache)) == 3


def test_a_converted_directory_is_itself_a_model(tmp_path: Path, own_cache: Path) -> None:
    first = load_model(str(save_tiny(tmp_path / "tiny")), "int8", "cpu")
    (name,) = copies(own_cache)
    for dtype in ("int8", "auto"):
        again = load_model(str(own_cache / name), dtype, "cpu")
        assert torch.equal(logits(again.model), logits(first.model))
        assert (again.tokenizer_digest, again.eos_tokens, again.vocab_size, again.dtype) == (
            first.tokenizer_digest, first.eos_tokens, first.vocab_size, first.dtype,
        )  # fmt: skip
    assert copies(own_cache) == [name]
    with pytest.raises(ModelError, match="cannot load the model in"):
        load_model(str(own_cache / name), "float32", "cpu")


def test_a_damaged_copy_is_a_clear_error(tmp_path: Path, own_cache: Path) -> None:
    directory = save_tiny(tmp_path / "tiny")
    load_model(str(directory), "int8", "cpu")
    (name,) = copies(own_cache)
    weights = own_cache / name / INTEGER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        ModelError, match="delete the directory, and it is converted again"
    ) as raised:
        load_model(str(directory), "int8", "cpu")
    assert name in str(raised.value)


def test_a_directory_without_safetensors_is_a_clear_error(tmp_path: Path, own_cache: Path) -> None:
    directory = save_tiny(tmp_path / "tiny")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        load_model(str(directory), "int8", "cpu")
    assert copies(own_cache) == []


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_half_written_and_two_processes_convert_once(
    tmp_path: Path, own_cache: Path
) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    program = (
        "import logging, os, signal, sys; logging.basicConfig(level='INFO', stream=sys.stdout)\n"
        "from engines.torch import conversion, converted\n"
        "if sys.argv[1:]:\n"
        "    conversion.save_tokenizer = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"source, _ = converted.load_integer({str(path)!r})\n"
        "print('at', source.location)"
    )
    command = [sys.executable, "-c", program]
    root = Path(conversion.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([*command, "kill"], cwd=root, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert all(name.startswith(".") for name in copies(own_cache))  # under a scratch name only
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=environment)
        for _ in range(2)
    ]
    said = "".join(process.communicate()[0].decode() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said.count("converting tiny to int8 once") == 1
    assert len({line for line in said.splitlines() if line.startswith("at ")}) == 1


# --- other architectures ----------------------------------------------------------------------


def gpt2(num_rows: int) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=num_rows, n_embd=32, n_layer=2, n_head=4, n_positions=512,
        initializer_range=0.3, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


OTHERS: list[Any] = [
    pytest.param(gpt2, id="gpt2"),
    *(
        pytest.param(
            lambda num_rows, kind=kind: random_model(
                kind, vocab_size=num_rows, head_dim=16,
                bos_token_id=0, eos_token_id=1, pad_token_id=None,
            ),
            id=kind.__name__,
        )
        for kind in (MistralForCausalLM, Gemma2ForCausalLM)
    ),
]  # fmt: skip


@pytest.mark.parametrize("make", OTHERS)
@torch.inference_mode()
def test_other_architectures_run_in_their_module_tree(make: Make, tmp_path: Path) -> None:
    """In int8 as far as their matrices are `nn.Linear`, and never called bitwise: what is between
    the matrices is not computed row by row."""
    model = make(NUM_TOKENS)
    model.save_pretrained(tmp_path / "other")
    byte_level_tokenizer().save_pretrained(tmp_path / "other")
    assert load_integer(str(tmp_path / "other")) is None
    loaded = load_model(str(tmp_path / "other"), "int8", "cpu")
    assert loaded.dtype is NumberFormat.INT8
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32)
    expected = plain(IDS[None]).logits[0]
    network = CausalNetwork(loaded.model, NUM_TOKENS, integer)
    assert any(isinstance(module, ProductModule) for module in loaded.model.modules())
    whole = network.logits(IDS, KVCache(), len(IDS))
    assert float((whole - expected).norm() / expected.norm()) < 0.15
    assert not probe(network, NUM_TOKENS, CPU).bitwise


# --- which format -----------------------------------------------------------------------------


def test_auto_is_int8_for_named_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda device: False)
    assert resolve_format("auto", CPU, registered=True) is NumberFormat.INT8
    assert resolve_format("auto", CPU) is NumberFormat.FLOAT32
    assert resolve_format("auto", torch.device("cuda"), registered=True) is NumberFormat.FLOAT32


def test_a_users_own_model_stays_in_floating_point_with_one_line_of_advice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger=loading.__name__)
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda device: False)
    directory = str(save_tiny(tmp_path / "tiny"))
    assert load_model(directory, "auto", "cpu").dtype is NumberFormat.FLOAT32
    lines = [r.getMessage() for r in caplog.records if r.name == loading.__name__]
    assert lines == [f"{directory} runs in float32; --dtype int8 is faster on this CPU"]
    caplog.clear()
    load_model(directory, "float32", "cpu")
    assert not caplog.records


def test_int8_where_it_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for load in (load_model, load_draft):
        with pytest.raises(ConfigurationError, match="runs on a CPU, not on 'cuda'"):
            load("default", "int8", "cuda")


def test_int8_is_refused_where_floating_point_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="trained or read in floating point"):
        load_causal_lm(str(save_tiny(tmp_path / "tiny")), "int8", "cpu")


def test_a_whole_model_is_a_draft_in_int8(tmp_path: Path) -> None:
    draft = load_draft(str(save_tiny(tmp_path / "tiny")), "int8", "cpu")
    assert draft.dtype is NumberFormat.INT8
    assert probe(draft.network, draft.vocab_size, CPU).bitwise
    network: Any = draft.network
    assert isinstance(network._network._fast[0], IntegerBody)
