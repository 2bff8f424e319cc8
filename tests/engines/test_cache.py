from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MambaConfig, MistralConfig, MistralForCausalLM

from bus.protocol.errors import LocalError, ModelError
from engines.torch.cache import KVCache, require_croppable
from tests.engines.tiny import tiny_llama


def sliding_mistral() -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=8,
            initializer_range=0.3,
        )
    ).eval()


@pytest.mark.parametrize("make", [lambda: tiny_llama(64), sliding_mistral])
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_been_run(
    make: Callable[[], Any],
) -> None:
    """Sliding windows too, far beyond the window: 30 positions with a window of 8."""
    model = make()
    tokens = torch.randint(64, (1, 30), generator=torch.Generator().manual_seed(1))
    wrong = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(2))
    cache = KVCache()
    with torch.inference_mode():
        model(tokens[:, :20], cache=cache.states)
        model(wrong, cache=cache.states)
        cache.keep(25)
        cache.keep(20)
        tail = model(tokens[:, 20:], cache=cache.states).logits
        whole = model(tokens, use_cache=False).logits
    assert cache.length == 30
    torch.testing.assert_close(tail, whole[:, 20:], rtol=1e-4, atol=1e-4)


def test_cropping_to_nothing_and_to_the_present_length() -> None:
    model = tiny_llama(64)
    cache = KVCache()
    cache.keep(0)
    model(torch.arange(5)[None], cache=cache.states)
    cache.keep(5)
    assert cache.length == 5
    cache.keep(0)
    assert cache.length == 0
    model(torch.arange(3)[None], cache=cache.states)
    assert cache.length == 3


@pytest.mark.parametrize("length", [-1, 6])
def test_a_cache_cannot_be_cropped_to_what_it_does_not_hold(length: int) -> None:
    cache = KVCache()
    tiny_llama(64)(torch.arange(5)[None], cache=cache.states)
    with pytest.raises(LocalError, match="positions of a cache of 5"):
        cache.keep(length)


def test_models_with_a_recurrent_state_are_refused() -> None:
    require_croppable(LlamaConfig(num_hidden_layers=2), "llama")
    require_croppable(MistralConfig(num_hidden_layers=2, sliding_window=8), "mistral")
    with pytest.raises(ModelError, match="cannot be rolled back"):
        require_croppable(MambaConfig(num_hidden_layers=2), "mamba")
