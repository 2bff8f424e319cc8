"""Tiny pairs of the model families, in the shape of their published configs: a target of random
weights, and a draft of its first layers, which agrees with it on many tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)

from engines.torch.precision import NumberFormat
from tests.engines.tiny import byte_level_tokenizer, random_model

NUM_TOKENS = 290
WINDOW = 16
"""Of Gemma 2's sliding layers."""
FLOAT32, INT8, BFLOAT16 = NumberFormat.FLOAT32, NumberFormat.INT8, NumberFormat.BFLOAT16
_LATER = 0.3  # of what the layers that the draft lacks add to the hidden state
_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


@dataclass(frozen=True)
class Family:
    """A pair's architecture.

    Attributes:
        make: transformers' class. config: as the family's `config.json` has it, scaled down.
        rows, draft_rows: of the two vocabularies; both have `NUM_TOKENS` tokens.
        layers, draft_layers: of the two models.
        exact: formats in which it is a target; in other formats it is refused.
    """

    make: Any
    config: dict[str, Any]
    rows: int = NUM_TOKENS
    draft_rows: int = NUM_TOKENS
    layers: int = 3
    draft_layers: int = 1
    exact: tuple[NumberFormat, ...] = (FLOAT32, INT8)

    def save(self, folder: Path) -> None:
        """Write `folder/target` and `folder/draft`."""
        target = self._model(self.rows, self.layers)
        draft = self._model(self.draft_rows, self.draft_layers)
        with torch.no_grad():
            for layer in target.model.layers[self.draft_layers :]:
                _quieten(layer)
            theirs = target.state_dict()
            for name, weight in draft.state_dict().items():
                shared = min(len(weight), len(theirs[name]))
                weight[:shared] = theirs[name][:shared]
        for name, model in (("target", target), ("draft", draft)):
            model.save_pretrained(folder / name)
            tokenizer().save_pretrained(folder / name)

    def _model(self, rows: int, num_layers: int) -> Any:
        return random_model(
            self.make, vocab_size=rows, num_hidden_layers=num_layers, initializer_range=0.3,
            **self.config, **_IDS,
        )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Of `NUM_TOKENS` tokens, with the one that transformers adds to a Qwen2's if it is missing."""
    made = byte_level_tokenizer(NUM_TOKENS - 1)
    made.add_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return made


def _quieten(layer: Any) -> None:
    """Let a layer add little to the hidden state."""
    after = getattr(layer, "post_feedforward_layernorm", None)
    if after is None:
        layer.self_attn.o_proj.weight *= _LATER
        layer.mlp.down_proj.weight *= _LATER
        return
    for norm in (layer.post_attention_layernorm, after):
        norm.weight.fill_(_LATER - 1)  # Gemma 2's gains are 1 + weight


def llama31_rope(original_length: int) -> dict[str, Any]:
    """Llama 3.1's scaling; a head of 16 has angles of all three kinds."""
    return {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": original_length, "rope_type": "llama3",
    }  # fmt: skip


QWEN2 = {
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "use_sliding_window": False,
    "sliding_window": WINDOW, "max_window_layers": 2,
}  # fmt: skip
GEMMA2 = {
    "head_dim": 24, "query_pre_attn_scalar": 144, "sliding_window": WINDOW,
    "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0,
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
}  # fmt: skip

FAMILIES = {
    "qwen2": Family(Qwen2ForCausalLM, {**QWEN2, "tie_word_embeddings": True}),
    "llama-3.1": Family(
        LlamaForCausalLM, {"rope_theta": 500000.0, "rope_scaling": llama31_rope(32)}
    ),
    "gemma-2": Family(
        Gemma2ForCausalLM, GEMMA2, layers=4, draft_layers=2, exact=(FLOAT32,)
    ),
    "deepseek-r1-distill-qwen": Family(
        Qwen2ForCausalLM, {**QWEN2, "tie_word_embeddings": False}, rows=320, draft_rows=300
    ),
}  # fmt: skip
OTHERS = {
    "qwen2-sliding": Family(
        Qwen2ForCausalLM, {**QWEN2, "use_sliding_window": True, "max_window_layers": 1},
        exact=(FLOAT32,),
    ),
    "mistral": Family(MistralForCausalLM, {"sliding_window": WINDOW}, exact=(FLOAT32,)),
}  # fmt: skip
"""Others with a sliding window, which run in the same module tree as Gemma 2."""

Pairs = Callable[[str], Path]


def saved_pairs(folder: Path) -> Pairs:
    """A function that gives the folder of a family's pair, written at first use."""

    def pair(name: str) -> Path:
        place = folder / name
        if not place.is_dir():
            {**FAMILIES, **OTHERS}[name].save(place)
        return place

    return pair
