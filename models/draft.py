"""Networks a draft model can be made of, behind one small interface.

`TrimmedDraft` is the draft this project ships: a few Llama layers on the default target's frozen
input embedding, with a head of only the most frequent tokens. `WholeDraft` is any causal language
model of transformers. Neither knows sampling or sessions.

Format of the shipped file (safetensors): `layers.N.….weight.int8` with `….weight.scale` (weight =
int8 × the scale of its row), norms as float16, `norm.weight`, and `vocab`, the sorted token ids of
the head's rows. Input embedding and head rows are the target's.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bus.arrays import Int32Array
from bus.errors import ModelError
from models.cache import KVCache
from models.linears import halved
from models.loading import (
    context_length,
    load_causal_lm,
    load_tokenizer,
    quiet_transformers,
)
from models.network import CausalNetwork, fast_body
from models.precision import resolve_device, resolve_dtype
from models.sources import DEFAULT_SPEC, first_line, resolve_source
from models.tokenizer import num_real_tokens, tokenizer_digest

SHIPPED_WEIGHTS = "draft-starter.safetensors"

_TARGET_WEIGHTS = "model.safetensors"
_TARGET_EMBEDDING = "model.embed_tokens.weight"


class DraftNetwork(Protocol):
    """What a draft model runs.

    Attributes:
        vocab: int32[H], the token id of each head row, or None where row and id are the same.
        head_size: H.
        weight_bytes: bytes of weights that one step reads (of the embedding only the head's rows).
    """

    vocab: Int32Array | None
    head_size: int
    weight_bytes: int

    def forward(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Run int64[1, n] behind what `cache` holds; float[H] logits of the last position."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A draft network ready to run; attributes as in `models.loading.LoadedModel`."""

    network: DraftNetwork
    tokenizer: Tokenizer
    name: str
    dtype: torch.dtype
    device: torch.device
    context_length: int
    vocab_size: int
    tokenizer_digest: str


class WholeDraft:
    """Any causal language model as a draft; rows behind the real tokens are cut off."""

    vocab: Int32Array | None = None

    def __init__(self, model: torch.nn.Module, head_size: int) -> None:
        """Take over `model`; it is used up."""
        self._network = CausalNetwork(model, head_size, halved)
        self.head_size = head_size
        self.weight_bytes = self._network.weight_bytes

    def forward(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        return self._network.logits(input_ids[0], cache, num_rows=1)[0]


class TrimmedDraft:
    """Layers of a model with a head of a part of the vocabulary."""

    def __init__(self, body: torch.nn.Module, head: Tensor, vocab: Int32Array) -> None:
        """Take over `body`, a model without a head; it is used up.

        Args:
            head: float[H, hidden], the head's rows of the tokens `vocab`.
        """
        self._body = fast_body(body, halved)
        self._head = halved([_linear(head)])
        self.vocab: Int32Array | None = vocab
        self.head_size = int(vocab.size)
        self.weight_bytes = self._body.weight_bytes + self._head.num_bytes

    def forward(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        return self._head(self._body.forward(input_ids[0], cache)[-1:])[0]


def _linear(weight: Tensor) -> torch.nn.Linear:
    """A module around float[out, in] weights, not copied."""
    num_out, num_in = weight.shape
    linear = torch.nn.Linear(num_in, num_out, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def load_draft(spec: str, dtype: str = "auto", device: str = "auto") -> LoadedDraft:
    """Load a draft.

    Args:
        spec: `default` for the shipped weights; else as for `models.loading.load_causal_lm`.

    Raises:
        ModelError: no such model, or one that cannot take part.
        ConfigurationError: unknown dtype or device.
    """
    if spec == DEFAULT_SPEC:
        return _load_shipped(dtype, device)
    whole = load_causal_lm(spec, dtype, device)
    return LoadedDraft(
        network=WholeDraft(whole.model, whole.vocab_size),
        tokenizer=whole.tokenizer,
        name=whole.name,
        dtype=whole.dtype,
        device=whole.device,
        context_length=whole.context_length,
        vocab_size=whole.vocab_size,
        tokenizer_digest=whole.tokenizer_digest,
    )


def load_trimmed(
    weights: Path, target: Path, dtype: torch.dtype, device: torch.device
) -> TrimmedDraft:
    """Build a trimmed draft from its file and the target it was made for.

    Of the target only the config and the embedding are read.

    Args:
        weights: file in the format above. target: directory of a Llama target in one file.

    Raises:
        ModelError: the file is damaged or does not fit this target.
    """
    try:
        stored = load_file(weights)
        with safe_open(target / _TARGET_WEIGHTS, "pt") as file:
            embedding: Tensor = file.get_tensor(_TARGET_EMBEDDING).to(dtype)
        vocab = stored.pop("vocab")
        layers = _dequantise(stored, dtype)
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"cannot read the draft {weights} on {target}: {error}") from error
    _check_vocab(vocab, embedding.shape[0], weights)
    body = _build_body(_draft_config(target, layers, weights), layers, embedding, weights)
    head = embedding[vocab.long()].to(device)
    return TrimmedDraft(body.to(device), head, vocab.numpy().astype(np.int32))


def _load_shipped(dtype: str, device: str) -> LoadedDraft:
    where = resolve_device(device)
    number_format = resolve_dtype(dtype, where)
    quiet_transformers()
    source = resolve_source(DEFAULT_SPEC)
    target = Path(source.location)
    tokenizer = load_tokenizer(source)
    config = AutoConfig.from_pretrained(target)
    with resources.as_file(resources.files("models") / "weights" / SHIPPED_WEIGHTS) as weights:
        network = load_trimmed(weights, target, number_format, where)
    return LoadedDraft(
        network=network,
        tokenizer=tokenizer,
        name=Path(SHIPPED_WEIGHTS).stem,
        dtype=number_format,
        device=where,
        context_length=context_length(config, source.name),
        vocab_size=num_real_tokens(tokenizer, config.vocab_size),
        tokenizer_digest=tokenizer_digest(tokenizer),
    )


def _dequantise(stored: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Stored tensors → a state dict of plain weights in `dtype`."""
    plain: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(".int8"):
            weight = name.removesuffix(".int8")
            scale = stored[f"{weight}.scale"].float()
            plain[weight] = (tensor.float() * scale[:, None]).to(dtype)
        elif not name.endswith(".scale"):
            plain[name] = tensor.to(dtype)
    return plain


def _check_vocab(vocab: Tensor, num_rows: int, weights: Path) -> None:
    ascending = bool((vocab[1:] > vocab[:-1]).all())
    if vocab.numel() == 0 or not ascending or vocab[0] < 0 or vocab[-1] >= num_rows:
        raise ModelError(
            f"draft {weights}: 'vocab' must be rising token ids below {num_rows}, the rows of the "
            "target's embedding; these weights belong to another target"
        )


def _draft_config(target: Path, layers: dict[str, Tensor], weights: Path) -> LlamaConfig:
    """The target's config, as deep as the draft."""
    depth = len({name.split(".")[1] for name in layers if name.startswith("layers.")})
    if depth == 0:
        raise ModelError(f"draft {weights} holds no layers; expected tensors 'layers.N.…'")
    config = LlamaConfig.from_pretrained(target)
    config.num_hidden_layers = depth
    return config


def _build_body(
    config: LlamaConfig, layers: dict[str, Tensor], embedding: Tensor, weights: Path
) -> torch.nn.Module:
    state = {**layers, "embed_tokens.weight": embedding}
    try:
        body, info = LlamaModel.from_pretrained(
            None, config=config, state_dict=state, dtype=embedding.dtype, output_loading_info=True
        )
    except RuntimeError as error:
        raise _misfit(weights, first_line(error)) from error
    for kind, names in info.items():
        if names:
            raise _misfit(weights, f"{kind}, among them {min(map(str, names))}")
    ready: torch.nn.Module = body.eval().requires_grad_(False)
    return ready


def _misfit(weights: Path, what: str) -> ModelError:
    return ModelError(f"draft {weights} does not fit the target it is loaded on: {what}")
