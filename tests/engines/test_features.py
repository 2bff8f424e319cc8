"""Hidden states that a tap receives: those of transformers, and a pass with one is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from bus.protocol.errors import LocalError
from engines.torch.cache import KVCache
from engines.torch.features import Features, Tap, feature_layers
from engines.torch.integer_decoder import convert
from engines.torch.linears import integer, packed
from engines.torch.network import CausalNetwork
from engines.torch.parts import Part
from engines.torch.target import TargetModel
from engines.torch.weights import MappedWeights
from tests.engines.tiny import random_model, save_tiny

VOCAB, NUM_LAYERS = 200, 5  # of 203 rows
IDS = torch.randint(VOCAB, (300,), generator=torch.Generator().manual_seed(3))
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: random_model(num_hidden_layers=NUM_LAYERS),
    "odd widths": lambda: random_model(
        num_hidden_layers=NUM_LAYERS, hidden_size=36, num_attention_heads=3, num_key_value_heads=1
    ),
    "qwen2, tied": lambda: random_model(
        Qwen2ForCausalLM, num_hidden_layers=NUM_LAYERS, tie_word_embeddings=True
    ),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("threads")


def int8(model: Any) -> CausalNetwork:
    decoder = convert(model.config, MappedWeights(model.state_dict()))
    return CausalNetwork(decoder, VOCAB, integer)


def expected(model: Any) -> Features:
    """As transformers computes them; its last state has the norm's gain."""
    states = model(IDS[None], output_hidden_states=True).hidden_states
    low_mid_high = torch.stack([states[k][0] for k in feature_layers(NUM_LAYERS)], dim=1)
    return Features(low_mid_high, states[-1][0] / model.model.norm.weight)


def cosines(one: Tensor, other: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(one, other, dim=-1)


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [(1, (1, 1, 1)), (2, (1, 1, 2)), (3, (1, 2, 3)), (4, (1, 2, 3)), (5, (2, 3, 4)), (8, (2, 4, 5)),
     (30, (2, 15, 27)), (32, (2, 16, 29))],
)  # fmt: skip
def test_three_layers_are_read(num_layers: int, layers: tuple[int, ...]) -> None:
    assert feature_layers(num_layers) == layers


@pytest.mark.parametrize("num_layers", [3, 4, 5, 6, 7, 9, 12, 64])
def test_they_rise(num_layers: int) -> None:
    low, middle, high = feature_layers(num_layers)
    assert 1 <= low < middle < high <= num_layers


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_features_in_float32_are_those_of_transformers(name: str) -> None:
    wanted = expected(MODELS[name]())
    features = CausalNetwork(MODELS[name](), VOCAB, packed).features(IDS.tolist())
    torch.testing.assert_close(features.low_mid_high, wanted.low_mid_high, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(features.last, wanted.last, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_features_in_int8_are_close_to_those_of_the_same_weights(name: str) -> None:
    wanted = expected(MODELS[name]())
    features = int8(MODELS[name]()).features(IDS.tolist())
    assert features.low_mid_high.shape == wanted.low_mid_high.shape
    assert cosines(features.low_mid_high, wanted.low_mid_high).min() > 0.99
    assert cosines(features.last, wanted.last).min() > 0.99
    ratios = features.low_mid_high.norm(dim=-1) / wanted.low_mid_high.norm(dim=-1)
    assert (ratios - 1).abs().max() < 0.1


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_tap_leaves_the_bits_of_an_int8_pass(name: str) -> None:
    network, tapped, plain = int8(MODELS[name]()), KVCache(), KVCache()
    parents = (-1, 0, 0, 1, 3, -1)
    for tokens, tree in ((IDS[:40], ()), (IDS[40:46], parents), (IDS[46:47], ())):
        ids = tokens.tolist()
        wanted = range(len(ids))
        tap = Tap(feature_layers(NUM_LAYERS))
        logits, states = network.run([Part(ids, tapped, tree, wanted)], tap)
        without, others = network.run([Part(ids, plain, tree, wanted)])
        assert torch.equal(logits, without)
        assert states is not None
        assert others is not None
        assert torch.equal(states, others)
        assert torch.equal(tap.last, states)
        assert tap.after(tap.layers).shape == (len(ids), len(tap.layers), states.shape[1])


@pytest.mark.parametrize("make", [int8, lambda model: CausalNetwork(model, VOCAB, packed)])
@torch.inference_mode()
def test_rows_of_a_tap_are_those_of_all_parts_in_order(make: Any) -> None:
    network, layers = make(MODELS["llama"]()), (1, NUM_LAYERS)
    ids = IDS.tolist()
    alone = [Tap(layers), Tap(layers)]
    network.run([Part(ids[:9], KVCache())], alone[0])
    network.run([Part(ids[9:13], KVCache(), (-1, -1, 0, 1))], alone[1])
    tap = Tap(layers)
    parts = [Part(ids[:9], KVCache()), Part(ids[9:13], KVCache(), (-1, -1, 0, 1))]
    network.run(parts, tap)
    for given, states in (("last", tap.last), ("streams", tap.streams.transpose(0, 1))):
        others = [getattr(one, given) for one in alone]
        wanted = torch.cat([x if given == "last" else x.transpose(0, 1) for x in others])
        torch.testing.assert_close(states, wanted)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make", [int8, lambda model: CausalNetwork(model, VOCAB, packed)])
@torch.inference_mode()
def test_rows_of_embedding_and_head_are_in_the_basis_of_the_features(make: Any, name: str) -> None:
    model, network = MODELS[name](), make(MODELS[name]())
    ids = torch.tensor([5, 0, 199, 7])
    embedding = model.get_input_embeddings().weight[ids]
    torch.testing.assert_close(network.embedding_rows(ids), embedding, rtol=1e-2, atol=1e-3)
    logits = network.features(IDS[:30].tolist()).last @ network.head_rows(ids).T
    plain = network.logits(IDS[:30], KVCache(), 30)[:, ids]
    torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-2)


def test_a_target_gives_features_of_a_text(tmp_path: Path) -> None:
    target = TargetModel.load(str(save_tiny(tmp_path)), "float32", "cpu")
    features = target.features([4, 7, 1])
    assert features.low_mid_high.shape == (3, 3, 32)
    assert features.last.shape == (3, 32)
    assert features.last.square().mean(dim=1).sqrt().tolist() == pytest.approx([1] * 3, rel=1e-3)
    with pytest.raises(LocalError, match="at least one"):
        target.features([])
