"""The fast ways to run a model against transformers' own, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from engines.torch.cache import KVCache
from engines.torch.linears import Layout, ProductModule, halved, packed
from engines.torch.llama import FloatBody, runs_as_llama
from engines.torch.network import CausalNetwork, ModuleBody, fast_body, weight_bytes
from tests.engines.tiny import random_model, tiny_llama

VOCAB = 64
IDS = torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}


def llama(**options: Any) -> Any:
    return random_model(LlamaForCausalLM, **{**SIZES, **options})


def qwen(**options: Any) -> Any:
    """Another architecture, with biases, tied."""
    return random_model(Qwen2ForCausalLM, **{**SIZES, "tie_word_embeddings": True, **options})


MODELS = [
    pytest.param(lambda: tiny_llama(VOCAB), id="tied"),
    pytest.param(lambda: llama(attention_bias=True, mlp_bias=True), id="biases"),
    pytest.param(lambda: llama(num_key_value_heads=4, head_dim=6), id="wide heads"),
    pytest.param(lambda: llama(num_key_value_heads=1, rope_parameters=LLAMA3_ROPE), id="llama3"),
    pytest.param(lambda: llama(rope_parameters=LINEAR_ROPE, rms_norm_eps=0.1), id="linear rope"),
    pytest.param(lambda: llama(rope_parameters=DYNAMIC_ROPE), id="dynamic rope"),
    pytest.param(lambda: llama(hidden_act="gelu"), id="gelu"),
    pytest.param(qwen, id="qwen"),
]


def rounded(model: Any) -> Any:
    """The model with its matrices as `halved` keeps them."""
    if "fbgemm" in torch.backends.quantized.supported_engines:
        head = model.lm_head  # tied weights are rounded as a head, not where rows are looked up
        model.lm_head = torch.nn.Linear(head.in_features, head.out_features, bias=False)
        model.lm_head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.half().float()
    return model


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("layout", [packed, halved])
@torch.inference_mode()
def test_chunks_single_tokens_and_rollbacks_give_transformers_logits(
    make: Callable[[], Any], layout: Layout
) -> None:
    """The same numbers summed in another order: logits of some tens, so 1e-4 is a few units in
    the last place of float32."""
    plain = make() if layout is packed else rounded(make())
    expected = plain(IDS[None], use_cache=False).logits[0]
    network, cache = CausalNetwork(make(), VOCAB, layout), KVCache()
    network.logits(IDS[:10], cache, num_rows=1)
    network.logits(IDS.flip(0)[:17], cache, num_rows=3)
    cache.keep(10)
    begin = 10
    for size in (1, 5, 1, 1, 16, 2, 24):
        logits = network.logits(IDS[begin : begin + size], cache, num_rows=size)
        torch.testing.assert_close(logits, expected[begin : begin + size], rtol=1e-4, atol=1e-4)
        begin += size
    assert cache.length == len(IDS)


@given(st.lists(st.integers(1, 11), max_size=5), st.integers(0, 59))
@settings(max_examples=25, deadline=None)
@torch.inference_mode()
def test_a_drafts_logits_are_a_function_of_the_prefix(chunks: list[int], cut: int) -> None:
    """However the prefix was cut into passes, and whatever was run and rolled back behind it."""
    network = CausalNetwork(llama(), VOCAB, halved)
    whole = network.logits(IDS, KVCache(), num_rows=1)
    cache = KVCache()
    for size in chunks:
        network.logits(IDS[: size + 1], cache, num_rows=1)
        cache.keep(min(cache.length, cut))
    cache.keep(0)
    for size in chunks:  # together at most 59 of the 60 tokens
        network.logits(IDS[cache.length :][:size], cache, num_rows=1)
    logits = network.logits(IDS[cache.length :], cache, num_rows=1)
    torch.testing.assert_close(logits.softmax(-1), whole.softmax(-1), rtol=2e-5, atol=1e-6)


@torch.inference_mode()
def test_fast_and_plain_passes_share_one_cache() -> None:
    plain, cache = llama(), KVCache()
    network = CausalNetwork(copy.deepcopy(plain), VOCAB, packed)
    plain(IDS[None, :20], cache=cache.states)
    network.logits(IDS[20:40], cache, num_rows=1)
    tail = plain(IDS[None, 40:], cache=cache.states).logits[0]
    expected = plain(IDS[None], use_cache=False).logits[0, 40:]
    torch.testing.assert_close(tail, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_long_sequences_outgrow_blocks_and_rotation_tables() -> None:
    plain, cache = tiny_llama(VOCAB), KVCache()
    network = CausalNetwork(tiny_llama(VOCAB), VOCAB, packed)
    ids = IDS.repeat(13)[:770]
    expected = plain(ids[None]).logits[0, -1:]
    for begin in range(0, 769, 150):
        network.logits(ids[begin : min(begin + 150, 769)], cache, num_rows=1)
    logits = network.logits(ids[769:], cache, num_rows=1)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_which_models_run_as_llama() -> None:
    assert isinstance(fast_body(llama().model, packed), FloatBody)
    assert isinstance(fast_body(qwen().model, packed), FloatBody)
    assert isinstance(
        fast_body(qwen(use_sliding_window=True, max_window_layers=0).model, packed), ModuleBody
    )
    assert not runs_as_llama(llama(rope_parameters=DYNAMIC_ROPE).model)
    assert not runs_as_llama(llama(hidden_act="gelu").model)
    assert not runs_as_llama(llama().bfloat16().model)


def test_models_in_bfloat16_are_left_as_they_were_loaded() -> None:
    for model in (llama().bfloat16(), qwen().bfloat16()):
        expected = model(IDS[None]).logits[0, -2:]
        network = CausalNetwork(model, VOCAB, packed)
        assert torch.equal(network.logits(IDS, KVCache(), num_rows=2), expected)
        assert not [x for x in model.modules() if isinstance(x, ProductModule)]


def test_matrices_stay_as_they_are_where_the_libraries_are_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(
        type(torch.backends.quantized), "supported_engines", property(lambda _: ["qnnpack"])
    )
    expected = llama()(IDS[None]).logits[0, -1:]
    for layout in (packed, halved):
        network = CausalNetwork(llama(), VOCAB, layout)
        assert network.weight_bytes == pytest.approx(weight_bytes(llama()), rel=0.02)
        torch.testing.assert_close(
            network.logits(IDS, KVCache(), 1), expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("make", [lambda: tiny_llama(VOCAB), llama, qwen])
def test_weight_bytes_count_the_head_and_not_the_rows_looked_up(make: Callable[[], Any]) -> None:
    model = make()
    linears = [x for x in model.modules() if isinstance(x, torch.nn.Linear)]
    matrices = 4 * sum(x.weight.numel() for x in linears)
    about = pytest.approx(matrices, rel=0.05)  # norms and biases come on top
    assert weight_bytes(model) == about
    assert CausalNetwork(make(), VOCAB, packed).weight_bytes == about
