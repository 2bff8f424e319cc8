from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bus.protocol.errors import ModelError
from engines.torch.cache import KVCache
from engines.torch.draft import load_draft, load_trimmed
from tests.engines.tiny import byte_level_tokenizer, save_tiny

CPU = torch.device("cpu")
VOCAB = torch.tensor([0, 1, 5, 40, 41, 200, 289], dtype=torch.int32)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "target", num_layers=3)


def as_run(weight: Any) -> Any:
    """A draft's matrices are rounded to float16 where products with those can be had."""
    halves = "fbgemm" in torch.backends.quantized.supported_engines
    return weight.half().float() if halves else weight


def quantised(target: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The target's own layers in the shipped format, and the weights a draft runs with."""
    weights = load_file(target / "model.safetensors")
    stored: dict[str, Any] = {"vocab": VOCAB}
    plain: dict[str, Any] = {}
    for new, old in enumerate((0, 2)):
        prefix = f"model.layers.{old}."
        for name, tensor in weights.items():
            if name.startswith(prefix):
                key = f"layers.{new}.{name.removeprefix(prefix)}"
                if tensor.ndim == 1:
                    stored[key] = tensor.half()
                    plain[key] = stored[key].float()
                    continue
                scale = (tensor.abs().amax(dim=1) / 127).half()
                stored[f"{key}.int8"] = (tensor / scale.float()[:, None]).round().to(torch.int8)
                stored[f"{key}.scale"] = scale
                plain[key] = as_run(stored[f"{key}.int8"].float() * scale.float()[:, None])
    stored["norm.weight"] = weights["model.norm.weight"].half()
    plain["norm.weight"] = stored["norm.weight"].float()
    return stored, plain


def test_a_trimmed_draft_is_the_dequantised_layers_on_the_targets_embedding(
    target: Path, tmp_path: Path
) -> None:
    """Against a transformers model of the same layers. Its float32 sums have another order: with
    logits of some tens, differences stay below 1e-4."""
    stored, plain = quantised(target)
    save_file(stored, tmp_path / "draft.safetensors")
    draft = load_trimmed(tmp_path / "draft.safetensors", target, torch.float32, CPU)
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig.from_pretrained(target)
    config.num_hidden_layers = 2
    body = LlamaModel(config).eval()
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    body.load_state_dict({**plain, "embed_tokens.weight": embedding})
    ids = torch.arange(30, 50)[None]
    with torch.inference_mode():
        logits = draft.logits(ids[0], KVCache(), 1)[0]
        expected = as_run(embedding[VOCAB.long()]) @ body(ids).last_hidden_state[0, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert draft.head_size == len(VOCAB)
    np.testing.assert_array_equal(draft.vocab, VOCAB.numpy())


def test_a_trimmed_draft_goes_on_from_its_cache(target: Path, tmp_path: Path) -> None:
    save_file(quantised(target)[0], tmp_path / "draft.safetensors")
    draft = load_trimmed(tmp_path / "draft.safetensors", target, torch.float32, CPU)
    ids, cache = torch.arange(30, 50)[None], KVCache()
    with torch.inference_mode():
        draft.logits(ids[0, :15], cache, 1)
        in_two = draft.logits(ids[0, 15:], cache, 1)
        whole = draft.logits(ids[0], KVCache(), 1)
        torch.testing.assert_close(in_two, whole, rtol=1e-4, atol=1e-4)
    assert cache.length == 20


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda t: t.pop("vocab"), id="no vocab"),
        pytest.param(lambda t: t.update(vocab=VOCAB.flip(0)), id="vocab not rising"),
        pytest.param(lambda t: t.update(vocab=VOCAB + 10_000), id="vocab beyond the embedding"),
        pytest.param(lambda t: t.pop("layers.1.self_attn.q_proj.weight.scale"), id="no scale"),
        pytest.param(lambda t: t.pop("layers.0.mlp.up_proj.weight.int8"), id="a weight missing"),
        pytest.param(lambda t: t.update(strange=torch.ones(2)), id="a weight too many"),
        pytest.param(lambda t: t.update({"norm.weight": torch.ones(7)}), id="another shape"),
        pytest.param(lambda t: [t.pop(k) for k in list(t) if "layers" in k], id="no layers"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    spoil: Callable[[dict[str, Any]], object], target: Path, tmp_path: Path
) -> None:
    stored, _ = quantised(target)
    spoil(stored)
    save_file(stored, tmp_path / "draft.safetensors")
    with pytest.raises(ModelError, match=r"draft\.safetensors"):
        load_trimmed(tmp_path / "draft.safetensors", target, torch.float32, CPU)


def test_a_damaged_draft_file_is_refused(target: Path, tmp_path: Path) -> None:
    (tmp_path / "draft.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot read the draft"):
        load_trimmed(tmp_path / "draft.safetensors", target, torch.float32, CPU)


def test_any_model_can_be_a_draft_and_loses_its_padding(target: Path) -> None:
    draft = load_draft(str(target), "float32", "cpu")
    assert draft.network.vocab is None
    assert draft.network.head_size == draft.vocab_size == len(byte_level_tokenizer())
    logits = draft.network.logits(torch.arange(5), KVCache(), 1)[0]
    assert logits.shape == (draft.vocab_size,)


@pytest.mark.long
@pytest.mark.slow_model
def test_the_shipped_draft_loads_and_often_agrees_with_its_target() -> None:
    from engines.chat import encode_prompt
    from engines.torch.loading import load_causal_lm

    target = load_causal_lm("default", "float32", "cpu")
    draft = load_draft("default", "float32", "cpu")
    assert draft.tokenizer_digest == target.tokenizer_digest
    assert draft.vocab_size == target.vocab_size == 49_152
    assert draft.context_length == target.context_length == 8192
    prompt = encode_prompt(target.tokenizer, "Tom has 3 apples and buys 5 more. How many?", False)
    answer = target.model.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=2
    )[0]
    vocab, agreed = draft.network.vocab, 0
    assert vocab is not None
    with torch.inference_mode():
        cache = KVCache()
        feed = answer[: len(prompt)]
        for token in answer[len(prompt) :]:
            row = int(draft.network.logits(feed, cache, 1).argmax())
            agreed += int(vocab[row]) == int(token)
            feed = token[None]
    assert agreed >= 12  # of 40; an unrelated network agrees with none
