"""The engines of this project, and the one that the documentation shows, against the suite."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2ForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM

from decoding.engine import Drafter, Target
from engines.kinds import DrafterKind, drafter_of
from engines.torch.draft import LoadedDraft, WholeDraft
from engines.torch.drafter import ModelDrafter
from engines.torch.integer_decoder import convert
from engines.torch.linears import halved
from engines.torch.loading import LoadedModel
from engines.torch.network import CausalNetwork
from engines.torch.precision import NumberFormat
from engines.torch.target import TargetModel
from engines.torch.weights import MappedWeights
from tests.engines.conformance import TargetConformance
from tests.engines.drafter_conformance import DrafterConformance
from tests.engines.tiny import byte_level_tokenizer, random_model
from tests.toy import ToyPair, ToyTarget, likely_tree

CPU = torch.device("cpu")
VOCAB = 200  # of 203 rows
PAGE = Path(__file__).parents[2] / "docs/add-an-engine.md"


def torch_target(model: Any, number_format: NumberFormat) -> TargetModel:
    if number_format is NumberFormat.INT8 and not isinstance(model, Gemma2ForCausalLM):
        model = convert(model.config, MappedWeights(model.state_dict()))
    return TargetModel(
        LoadedModel(
            model=model, tokenizer=byte_level_tokenizer(), name="tiny", dtype=number_format,
            device=CPU, context_length=2048, vocab_size=VOCAB, tokenizer_digest="t",
            eos_tokens=frozenset(),
        )
    )  # fmt: skip


class TestToy(TargetConformance):
    @pytest.fixture
    def target(self) -> Target[Any]:
        return ToyTarget(ToyPair(vocab_size=50))


class TestToySpeculator(TargetConformance):
    @pytest.fixture
    def target(self) -> Target[Any]:
        target = ToyTarget(ToyPair(vocab_size=50, num_sparse=6, speculator=likely_tree))
        assert target.speculators
        return target


class TestDocumented(TargetConformance):
    @pytest.fixture
    def target(self) -> Target[Any]:
        names: dict[str, Any] = {}
        code = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
        assert code is not None
        exec(code[1], names)
        assert sum(bool(line.strip()) for line in code[1].splitlines()) < 60
        target: Target[Any] = names["BigramTarget"]([5, 3, 5, 8, 9, 7, 9, 3, 2] * 3, 64)
        return target


@pytest.mark.parametrize("make", [LlamaForCausalLM, Qwen2ForCausalLM], ids=["llama", "qwen2"])
class TestInteger(TargetConformance):
    @pytest.fixture
    def target(self, make: Any) -> Target[Any]:
        target = torch_target(random_model(make), NumberFormat.INT8)
        assert target.capabilities.bitwise
        assert target.capabilities.trees
        return target


@pytest.mark.parametrize("make", [LlamaForCausalLM, Qwen2ForCausalLM], ids=["llama", "qwen2"])
class TestFloat(TargetConformance):
    @pytest.fixture
    def target(self, make: Any) -> Target[Any]:
        target = torch_target(random_model(make), NumberFormat.FLOAT32)
        assert target.capabilities.trees
        return target


class TestModules(TargetConformance):
    """An architecture without a body of its own."""

    @pytest.fixture
    def target(self) -> Target[Any]:
        target = torch_target(random_model(Gemma2ForCausalLM), NumberFormat.FLOAT32)
        assert not target.capabilities.trees
        return target


def model_drafter() -> ModelDrafter:
    network = CausalNetwork(random_model(), VOCAB, halved)
    return ModelDrafter(
        LoadedDraft(
            network=WholeDraft(network, VOCAB), tokenizer=byte_level_tokenizer(), name="tiny",
            dtype=NumberFormat.FLOAT32, device=CPU, context_length=2048, vocab_size=VOCAB,
            tokenizer_digest="t",
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", DrafterKind)
class TestDrafters(DrafterConformance):
    @pytest.fixture
    def drafter(self, kind: DrafterKind) -> Drafter[Any]:
        return drafter_of(kind, model_drafter())


def test_another_architecture_in_int8_products_is_not_called_bitwise() -> None:
    target = torch_target(random_model(Gemma2ForCausalLM), NumberFormat.INT8)
    assert not target.capabilities.bitwise
    assert not target.capabilities.trees
