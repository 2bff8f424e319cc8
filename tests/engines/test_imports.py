"""What a worker loads of torch and transformers: a model in int8 runs in kernels of this project,
and whatever else is imported is paid for at every start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import engines
from engines.catalog.sources import ModelSource
from engines.torch.draft import load_draft
from engines.torch.integer_decoder import IntegerDecoder, read_converted_config
from engines.torch.loading import load_config, load_model, load_tokenizer
from engines.torch.rope import rope_frequencies
from tests.engines.tiny import (
    byte_level_tokenizer,
    qwen2_tokenizer,
    save_tiny,
    tiny_llama,
    tiny_qwen2,
)

ROOT = Path(engines.__file__).parents[1]
SLOW = (
    "gguf",
    "scipy.optimize",
    "sympy",
    "torch._dynamo",
    "torch.distributed.tensor",
    "transformers.core_model_loading",
    "transformers.modeling_utils",
    "transformers.models.llama.configuration_llama",
    "transformers.models.llama.modeling_llama",
)
PROGRAM = f"""
import json, sys
slow = lambda: [name for name in {SLOW!r} if name in sys.modules]
import cloud_worker.server, edge_worker.server
imported = slow()
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel
dtypes = [str(kind.load(sys.argv[1], "int8", "cpu").dtype) for kind in (TargetModel, ModelDrafter)]
print(json.dumps([imported, slow(), dtypes]))
"""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def converted(cache: Path) -> Path:
    """The directory of the one converted model in a cache."""
    (directory,) = (path for path in (cache / "e2sci/models").iterdir() if path.is_dir())
    return directory


def run(program: str, *args: str) -> Any:
    """What a program prints as JSON on its last line, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_a_worker_in_int8_loads_no_model_code_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when its modules are imported nor when it has loaded a converted model."""
    with monkeypatch.context() as cached:  # compiled kernels stay in the cache of the other tests
        cached.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        load_model(str(save_tiny(tmp_path / "tiny")), "int8", "cpu")
    directory = converted(tmp_path / "cache")
    imported, loaded, dtypes = run(PROGRAM, str(directory))
    assert imported == []
    assert loaded == []
    assert dtypes == ["int8", "int8"]


def test_a_command_finds_models_without_torch() -> None:
    program = (
        "import json, sys\n"
        "from engines.catalog.sources import find_source\n"
        "found = find_source('acme/model')\n"
        "print(json.dumps([found.is_local, [n for n in ('torch', 'transformers', 'numpy')\n"
        "                  if n in sys.modules]]))"
    )
    assert run(program) == [False, []]


# --- what replaces the modules that are left out -----------------------------------------

ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10_000.0},
    {"rope_type": "default", "rope_theta": 1_000_000},
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    },
    {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
]  # fmt: skip


@pytest.mark.parametrize("head_dim", [None, 24])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: str(rope["rope_type"]))
def test_frequencies_are_those_of_transformers_to_the_bit(
    rope: dict[str, Any], head_dim: int | None, tmp_path: Path
) -> None:
    """From a config as transformers made it, and from one that was written and read again."""
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=512, head_dim=head_dim,
        rope_parameters=rope,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    rotary = LlamaRotaryEmbedding(config)
    for given in (config, read_converted_config(tmp_path)):
        frequencies, scaling = rope_frequencies(given)
        assert torch.equal(frequencies, rotary.inv_freq)
        assert scaling == rotary.attention_scaling


@pytest.mark.parametrize(
    ("make", "tokenizer"),
    [(tiny_llama, byte_level_tokenizer()), (tiny_qwen2, qwen2_tokenizer())],
    ids=["llama", "qwen2"],
)
def test_a_converted_model_has_the_config_and_the_tokenizer_of_its_type(
    make: Any, tokenizer: Any, tmp_path: Path, own_cache: Path
) -> None:
    make(len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    loaded = load_model(str(tmp_path / "tiny"), "int8", "cpu")
    assert isinstance(loaded.model, IntegerDecoder)
    directory = converted(own_cache)
    source = ModelSource("tiny", str(directory), is_local=True)
    full, light = AutoConfig.from_pretrained(directory), load_config(source)
    unread = {"_name_or_path", "dtype", "transformers_version", "use_cache"}
    for name, value in full.to_dict().items():
        if name not in unread:
            assert getattr(light, name) == value, name
    assert light.get_text_config() is light
    plain, ours = AutoTokenizer.from_pretrained(directory), load_tokenizer(source)
    assert type(ours) is type(plain)
    assert ours.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    assert load_draft(str(directory), "int8", "cpu").context_length == full.max_position_embeddings
