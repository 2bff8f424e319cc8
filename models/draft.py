"""Networks a draft model can be made of, behind one small interface.

`TrimmedDraft` is the draft this project ships: a few Llama layers on the default target's frozen
input embedding, with a head of only the most frequent tokens. `WholeDraft` is any causal language
model of transformers. Neither knows sampling or sessions.

Format of a draft's weights (safetensors): `layers.N.….weight.int8` with `….weight.scale` (weight =
int8 × the scale of its row), norms as float16, `norm.weight`, and `vocab`, the sorted token ids of
the head's rows. Input embedding and head rows are the target's. The shipped file takes them from
the default target; a directory that `e2sci distill` wrote holds

- `draft.safetensors`, the weights as above; that file makes a directory a trimmed draft;
- `embedding.safetensors`, the target's input embedding under its name in the body and, where the
  target does not tie its head to it, the head's rows as `head.weight`;
- `config.json` (the target's, as deep as the draft) and the target's tokenizer.
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
from transformers import MODEL_MAPPING, AutoConfig, LlamaConfig
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.configuration_utils import PreTrainedConfig

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

SHIPPED_WEIGHTS = "draft-smollm2-135m.safetensors"
DRAFT_WEIGHTS = "draft.safetensors"
EMBEDDING_WEIGHTS = "embedding.safetensors"
HEAD_KEY = "head.weight"

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

    def rows(self, input_ids: Tensor) -> Tensor:
        """float[n, H] logits of every position of int64[1, n], read from the beginning."""
        return self._network.logits(input_ids[0], KVCache(), num_rows=input_ids.shape[1])


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

    def rows(self, input_ids: Tensor) -> Tensor:
        """float[n, H] logits of every position of int64[1, n], read from the beginning."""
        return self._head(self._body.forward(input_ids[0], KVCache()))


def _linear(weight: Tensor) -> torch.nn.Linear:
    """A module around float[out, in] weights, not copied."""
    num_out, num_in = weight.shape
    linear = torch.nn.Linear(num_in, num_out, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def load_draft(spec: str, dtype: str = "auto", device: str = "auto") -> LoadedDraft:
    """Load a draft.

    Args:
        spec: `default` for the shipped weights; a directory that `e2sci distill` wrote; else as for
            `models.loading.load_causal_lm`.

    Raises:
        ModelError: no such model, or one that cannot take part.
        ConfigurationError: unknown dtype or device.
    """
    if is_trimmed(spec):
        return _load_trimmed_draft(spec, dtype, device)
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


def is_trimmed(spec: str) -> bool:
    """Whether `spec` is the shipped draft or a directory that `e2sci distill` wrote."""
    return spec == DEFAULT_SPEC or (Path(spec).expanduser() / DRAFT_WEIGHTS).is_file()


def load_trimmed(
    weights: Path, target: Path, dtype: torch.dtype, device: torch.device
) -> TrimmedDraft:
    """Build a trimmed draft from its file and the target it was made for.

    Args:
        weights: file in the format above. target: the draft's own directory, or that of a Llama
            target in one file, of which only the config and the embedding are read.

    Raises:
        ModelError: the file is damaged or does not fit this target.
    """
    body, head, vocab = read_trimmed(weights, target, dtype)
    return TrimmedDraft(body.to(device), head.to(device), vocab.numpy().astype(np.int32))


def read_trimmed(
    weights: Path, target: Path, dtype: torch.dtype
) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """Body, head (float[H, hidden]) and vocab (int32[H]) of a trimmed draft, on the CPU.

    Arguments and errors as in `load_trimmed`.
    """
    try:
        stored = load_file(weights)
        frozen = {name: weight.to(dtype) for name, weight in _frozen(target).items()}
        vocab = stored.pop("vocab")
        layers = _dequantise(stored, dtype)
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"cannot read the draft {weights} on {target}: {error}") from error
    head = frozen.pop(HEAD_KEY, None)
    num_rows = min(weight.shape[0] for weight in frozen.values())
    _check_vocab(vocab, num_rows, weights)
    if head is None:
        (embedding,) = frozen.values()
        head = embedding[vocab.long()]
    body = _build_body(_draft_config(target, layers, weights), {**layers, **frozen}, dtype, weights)
    return body, head, vocab


def trimmed_location(spec: str) -> tuple[Path, Path]:
    """Weights and target of the shipped draft or of a draft directory, as `read_trimmed` takes
    them."""
    if spec == DEFAULT_SPEC:
        # An installed package is a folder, never an archive: the models need far more files.
        weights = Path(str(resources.files("models") / "weights" / SHIPPED_WEIGHTS))
        return weights, Path(resolve_source(DEFAULT_SPEC).location)
    directory = Path(spec).expanduser()
    return directory / DRAFT_WEIGHTS, directory


def _load_trimmed_draft(spec: str, dtype: str, device: str) -> LoadedDraft:
    where = resolve_device(device)
    number_format = resolve_dtype(dtype, where)
    quiet_transformers()
    source = resolve_source(spec)
    tokenizer = load_tokenizer(source)
    config = AutoConfig.from_pretrained(source.location)
    weights, target = trimmed_location(spec)
    return LoadedDraft(
        network=load_trimmed(weights, target, number_format, where),
        tokenizer=tokenizer,
        name=weights.stem if spec == DEFAULT_SPEC else source.name,
        dtype=number_format,
        device=where,
        context_length=context_length(config, source.name),
        vocab_size=num_real_tokens(tokenizer, config.get_text_config().vocab_size),
        tokenizer_digest=tokenizer_digest(tokenizer),
    )


def _frozen(target: Path) -> dict[str, Tensor]:
    """What the draft has from its target: the embedding, and the head where it is not tied."""
    if (target / EMBEDDING_WEIGHTS).is_file():
        return load_file(target / EMBEDDING_WEIGHTS)
    with safe_open(target / _TARGET_WEIGHTS, "pt") as file:
        return {_TARGET_EMBEDDING.removeprefix("model."): file.get_tensor(_TARGET_EMBEDDING)}


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


def _draft_config(target: Path, layers: dict[str, Tensor], weights: Path) -> PreTrainedConfig:
    """The target's config, as deep as the draft."""
    if (target / EMBEDDING_WEIGHTS).is_file():
        return AutoConfig.from_pretrained(target)
    depth = len({name.split(".")[1] for name in layers if name.startswith("layers.")})
    if depth == 0:
        raise ModelError(f"draft {weights} holds no layers; expected tensors 'layers.N.…'")
    config = LlamaConfig.from_pretrained(target)
    config.num_hidden_layers = depth
    return config


def _build_body(
    config: PreTrainedConfig, state: dict[str, Tensor], dtype: torch.dtype, weights: Path
) -> torch.nn.Module:
    try:
        body, info = MODEL_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
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
