"""The int8 pass: the same bits however tokens are cut into passes, and near the float32 model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2ForCausalLM

from bus.protocol.errors import ModelError
from engines.chat import encode_prompt
from engines.torch.cache import KVCache
from engines.torch.draft import DraftNetwork, load_draft
from engines.torch.integer_decoder import INTEGER_WEIGHTS, IntegerDecoder, convert
from engines.torch.linears import integer
from engines.torch.loading import load_model
from engines.torch.network import CausalNetwork
from engines.torch.weights import MappedWeights
from tests.engines.tiny import random_model

VOCAB = 200  # of 203 rows
IDS = torch.randint(VOCAB, (64,), generator=torch.Generator().manual_seed(3))
OTHERS = IDS.flip(0)

MODELS: dict[str, Callable[[], Any]] = {
    "grouped heads": random_model,
    "tied": lambda: random_model(tie_word_embeddings=True),
    "one kv head": lambda: random_model(num_key_value_heads=1),
    "biases": lambda: random_model(attention_bias=True, mlp_bias=True),
    "wide heads": lambda: random_model(head_dim=20),
    "rows at odd places": lambda: random_model(
        head_dim=6, num_attention_heads=2, num_key_value_heads=1
    ),
    "odd widths": lambda: random_model(
        hidden_size=36, intermediate_size=50, num_attention_heads=3, num_key_value_heads=1
    ),
    "qwen2": lambda: random_model(Qwen2ForCausalLM),
    "qwen2 tied": lambda: random_model(
        Qwen2ForCausalLM, hidden_size=96, num_attention_heads=6, tie_word_embeddings=True
    ),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("threads")


def converted(model: Any) -> IntegerDecoder:
    return convert(model.config, MappedWeights(model.state_dict()))


@once
def network(name: str) -> CausalNetwork:
    return CausalNetwork(converted(MODELS[name]()), VOCAB, integer)


@once
def expected(name: str) -> Tensor:
    """float32[64, V], token by token on one thread."""
    torch.set_num_threads(1)
    cache = KVCache()
    return torch.cat([network(name).logits(one, cache, 1) for one in torch.split(IDS, 1)])


# Each step rolls back some positions, or runs others and rolls them back, and then goes on.
STEPS = st.lists(
    st.tuples(st.integers(1, 16), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8
)


def check_passes(
    network: CausalNetwork | DraftNetwork, ids: Tensor, wanted: Tensor, prefill: int,
    steps: list[tuple[int, int, int]],
) -> None:  # fmt: skip
    cache = KVCache()
    first = network.logits(ids[:prefill], cache, 1)
    assert torch.equal(first, wanted[prefill - 1 : prefill])
    for size, back, other in steps:
        cache.keep(max(1, cache.length - back))
        begin = cache.length
        if other:
            network.logits(ids.flip(0)[:other], cache, min(other, 2))
            cache.keep(begin)
        feed = ids[begin : begin + size]
        if len(feed):
            logits = network.logits(feed, cache, len(feed))
            assert torch.equal(logits, wanted[begin : begin + len(feed)])


@pytest.mark.parametrize("name", MODELS)
@given(st.integers(1, 60), STEPS, st.integers(1, 4))
@settings(max_examples=8, deadline=None)
@torch.inference_mode()
def test_logits_have_the_same_bits_however_tokens_are_cut(
    name: str, prefill: int, steps: list[tuple[int, int, int]], num_threads: int
) -> None:
    wanted = expected(name)
    torch.set_num_threads(num_threads)
    check_passes(network(name), IDS, wanted, prefill, steps)
    sizes = [size for size, _, _ in steps] * 64
    cache = KVCache()
    parts: list[Tensor] = []
    while cache.length < len(IDS):
        part = IDS[cache.length :][: sizes[len(parts)]]
        parts.append(network(name).logits(part, cache, len(part)))
    assert torch.equal(torch.cat(parts), wanted)


@torch.inference_mode()
def test_the_same_bits_beyond_a_block_of_the_cache_and_of_the_rotation() -> None:
    ids = IDS.repeat(13)[:770]
    run = network("grouped heads")
    whole = run.logits(ids, KVCache(), len(ids))
    cache = KVCache()
    parts = [run.logits(x, cache, len(x)) for x in torch.split(ids, [255, 1, 2, 256, 250, 6])]
    assert torch.equal(torch.cat(parts), whole)
    cache.keep(200)
    assert torch.equal(run.logits(ids[200:203], cache, 3), whole[200:203])


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_are_near_those_in_float32(name: str) -> None:
    """Rounding a weight to ±127 steps of its row's peak, about 3σ of a rotated row, errs by
    3/127/√12 ≈ 0.7 % of σ; seven products of two layers add up to about 2 %. A wrong matrix, gain,
    bias or rotation gives 100 %."""
    model = MODELS[name]()
    plain = model(IDS[None]).logits[0, :, :VOCAB]
    error = float((expected(name) - plain).norm() / plain.norm())
    assert 1e-4 < error < 0.05
    # ½·Var(Δ logits) is what a small error of the logits costs
    log_p, log_q = plain.log_softmax(1), expected(name).log_softmax(1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    assert divergence < 2 * (expected(name) - plain).var(dim=1).mean()


@torch.inference_mode()
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    decoder = converted(MODELS["biases"]())
    narrow = decoder.narrowed(torch.tensor([0, 7, 99], dtype=torch.int32))
    full, part = (
        CausalNetwork(kept, VOCAB, integer).logits(IDS, KVCache(), 64) for kept in (decoder, narrow)
    )
    assert torch.equal(part, full[:, [0, 7, 99]])
    for kept, wanted in ((decoder, full), (narrow, part)):
        kept.save(tmp_path)
        loaded = IntegerDecoder.load(tmp_path)
        assert (loaded.vocab is None) == (kept.vocab is None)
        assert torch.equal(CausalNetwork(loaded, VOCAB, integer).logits(IDS, KVCache(), 64), wanted)


@pytest.mark.parametrize("damage", ["cut", "gone", "config", "tensor"])
def test_a_damaged_copy_says_what_to_do(damage: str, tmp_path: Path) -> None:
    converted(MODELS["tied"]()).save(tmp_path)
    weights = tmp_path / INTEGER_WEIGHTS
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    elif damage == "config":
        (tmp_path / "config.json").write_text("{")
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["down.scale"]
        save_file(tensors, weights)
    with pytest.raises(ModelError, match="delete the directory, and it is converted again"):
        IntegerDecoder.load(tmp_path)


def test_a_missing_tensor_is_named() -> None:
    model = MODELS["tied"]()
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    with pytest.raises(ModelError, match=r"no weights 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        convert(model.config, MappedWeights(state))


@pytest.mark.slow_model
@torch.inference_mode()
def test_the_default_pair_has_the_same_bits_however_tokens_are_cut() -> None:
    target, draft = load_model("default", "int8", "cpu"), load_draft("default", "int8", "cpu")
    prompt = encode_prompt(target.tokenizer, "Tom has 3 apples and buys 5 more. How many?", False)
    ids = torch.tensor([*prompt, *prompt[::-1]])[:64]
    whole = CausalNetwork(target.model, target.vocab_size, integer)
    steps = [(1, 0, 0), (5, 2, 3), (16, 9, 0), (1, 0, 9), (8, 4, 1), (16, 0, 0)]
    for run in (whole, draft.network):
        torch.set_num_threads(1)
        wanted = run.logits(ids, KVCache(), 64)
        for num_threads, prefill in ((1, 1), (2, 20), (3, 33)):
            torch.set_num_threads(num_threads)
            check_passes(run, ids, wanted, prefill, steps)
