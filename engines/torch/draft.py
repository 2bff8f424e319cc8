"""Networks a draft model can be made of, behind one small interface.

`TrimmedDraft` has a head of only the most frequent tokens: the draft this project ships, a few
Llama layers on the default target's frozen input embedding; or a whole model whose head was
narrowed (`engines.catalog.ranking`). `WholeDraft` is any causal language model. Neither knows
sampling or sessions.

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

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import MODEL_MAPPING, AutoConfig

from bus.protocol.arrays import Int32Array
from bus.protocol.errors import ModelError
from engines.catalog.digests import file_digest
from engines.catalog.places import cache_root
from engines.catalog.ranking import most_frequent
from engines.catalog.registry import split_head
from engines.catalog.sources import DEFAULT_SPEC, ModelSource, find_source
from engines.tokenizer import num_real_tokens, tokenizer_digest
from engines.torch.cache import KVCache
from engines.torch.converted import content_key
from engines.torch.draft_file import check_vocab, depth, dequantise, misfit
from engines.torch.integer import IntegerProduct
from engines.torch.integer_decoder import FORMAT, IntegerDecoder, convert
from engines.torch.linears import Product, halved, integer
from engines.torch.llama import IntegerBody, has_llama_config
from engines.torch.loading import (
    Loaded,
    LoadedModel,
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from engines.torch.network import Body, CausalNetwork, Network, fast_body
from engines.torch.parts import Part, wanted_rows
from engines.torch.precision import NumberFormat, resolve_device, resolve_format, torch_dtype
from engines.torch.sources import first_line, made_once, resolve_source, write_complete
from engines.torch.weights import MappedWeights

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

SHIPPED_WEIGHTS = "draft-smollm2-135m.safetensors"
DRAFT_WEIGHTS = "draft.safetensors"
EMBEDDING_WEIGHTS = "embedding.safetensors"
HEAD_KEY = "head.weight"
_TARGET_WEIGHTS = "model.safetensors"
_EMBEDDING = "embed_tokens.weight"
_TARGET_EMBEDDING = f"model.{_EMBEDDING}"


class DraftNetwork(Protocol):
    """What a draft model runs.

    Attributes:
        vocab: int32[H], the token id of each head row, or None where row and id are the same.
        head_size: H.
        weight_bytes: bytes of weights that one step reads (of the embedding only the head's rows).
        rowwise: as of an `engines.torch.network.Network`.
    """

    vocab: Int32Array | None
    head_size: int
    weight_bytes: int
    rowwise: bool

    def run(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
        """As `engines.torch.network.Network.run`, with H logits a row."""
        ...

    def logits(self, input_ids: Tensor, cache: KVCache, num_rows: int) -> Tensor:
        """Run int64[n] after what `cache` holds; float[num_rows, H] of the last positions."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDraft(Loaded):
    """A draft network ready to run."""

    network: DraftNetwork


class WholeDraft(Network):
    """Any causal language model as a draft; rows beyond the real tokens are cut off."""

    vocab: Int32Array | None = None

    def __init__(self, network: CausalNetwork, head_size: int) -> None:
        self._network = network
        self.head_size = head_size
        self.weight_bytes = network.weight_bytes
        self.rowwise = network.rowwise

    def run(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
        """As `Network.run`."""
        return self._network.run(parts)


class TrimmedDraft(Network):
    """Layers of a model with a head of a part of the vocabulary."""

    def __init__(self, body: Body, head: Product, vocab: Int32Array) -> None:
        self._body = body
        self._head = head
        self.vocab: Int32Array | None = vocab
        self.head_size = int(vocab.size)
        self.weight_bytes = body.weight_bytes + head.num_bytes
        self.rowwise = body.rowwise

    def run(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
        """As `Network.run`."""
        states = self._body.forward(parts)[wanted_rows(parts)]
        return self._head(states), states


def _narrowed(decoder: IntegerDecoder) -> TrimmedDraft:
    """A model in int8 with a `vocab`."""
    assert decoder.vocab is not None
    vocab = decoder.vocab.numpy().astype(np.int32)
    return TrimmedDraft(IntegerBody(decoder), IntegerProduct(decoder.head), vocab)


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
            `engines.torch.loading.load_causal_lm`.

    Raises:
        ModelError: no such model, or one that cannot take part.
        ConfigurationError: unknown dtype or device.
    """
    if is_trimmed(spec):
        return _load_trimmed_draft(spec, dtype, device)
    name, head_size = split_head(spec)
    whole = load_model(name, dtype, device)
    return described(whole, _whole(whole, head_size))


def described(loaded: Loaded, network: DraftNetwork) -> LoadedDraft:
    """A network with what is known of the model it was made from."""
    known = {field.name: getattr(loaded, field.name) for field in fields(Loaded)}
    return LoadedDraft(network=network, **known)


def _whole(loaded: LoadedModel, head_size: int | None) -> DraftNetwork:
    """A model as a draft, with a head of its `head_size` most frequent tokens where given.

    Raises:
        ModelError: nothing ranks the tokens of its tokenizer, or its format keeps the head whole.
    """
    if head_size is None or head_size >= loaded.vocab_size:
        layout = integer if loaded.dtype is NumberFormat.INT8 else halved
        network = CausalNetwork(loaded.model, loaded.vocab_size, layout)
        return WholeDraft(network, loaded.vocab_size)
    vocab = most_frequent(loaded.tokenizer, loaded.tokenizer_digest, head_size)
    if isinstance(loaded.model, IntegerDecoder):
        return _narrowed(loaded.model.narrowed(torch.from_numpy(vocab)))
    model: Any = loaded.model
    rows = model.get_output_embeddings().weight[torch.from_numpy(vocab).long()]
    return TrimmedDraft(fast_body(model.base_model, halved), halved([_linear(rows)]), vocab)


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
    return TrimmedDraft(
        fast_body(body.to(device), halved), halved([_linear(head.to(device))]),
        vocab.numpy().astype(np.int32),
    )  # fmt: skip


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
        layers = dequantise(stored, dtype)
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"cannot read the draft {weights} on {target}: {error}") from error
    head = frozen.pop(HEAD_KEY, None)
    num_rows = min(weight.shape[0] for weight in frozen.values())
    check_vocab(vocab, num_rows, weights)
    if head is None:
        (embedding,) = frozen.values()
        head = embedding[vocab.long()]
    body = _build_body(_draft_config(target, layers, weights), {**layers, **frozen}, dtype, weights)
    return body, head, vocab


def shipped_weights() -> Path:
    """The shipped draft's file."""
    # An installed package is a folder, never an archive: the models need far more files.
    return Path(str(resources.files("engines.torch") / "shipped" / SHIPPED_WEIGHTS))


def trimmed_location(spec: str) -> tuple[Path, Path]:
    """Weights and target of the shipped draft or of a draft directory, as `read_trimmed` takes
    them."""
    if spec == DEFAULT_SPEC:
        return shipped_weights(), Path(resolve_source(DEFAULT_SPEC).location)
    directory = Path(spec).expanduser()
    return directory / DRAFT_WEIGHTS, directory


def _load_trimmed_draft(spec: str, dtype: str, device: str) -> LoadedDraft:
    where = resolve_device(device)
    number_format = resolve_format(dtype, where, registered=spec == DEFAULT_SPEC)
    quiet_transformers()
    if number_format is NumberFormat.INT8:
        directory, decoder = load_integer_trimmed(spec)
        source = ModelSource(directory.name, str(directory), is_local=True)
        network: DraftNetwork = _narrowed(decoder)
    else:
        source = resolve_source(spec)
        weights, target = trimmed_location(spec)
        network = load_trimmed(weights, target, torch_dtype(number_format), where)
    tokenizer = load_tokenizer(source)
    config = load_config(source)
    return LoadedDraft(
        network=network,
        tokenizer=tokenizer,
        name=Path(SHIPPED_WEIGHTS).stem if spec == DEFAULT_SPEC else Path(spec).resolve().name,
        dtype=number_format,
        device=where,
        context_length=context_length(config, source.name),
        vocab_size=num_real_tokens(tokenizer, config.get_text_config().vocab_size),
        tokenizer_digest=tokenizer_digest(tokenizer),
    )


def load_integer_trimmed(spec: str) -> tuple[Path, IntegerDecoder]:
    """A trimmed draft in int8, and the directory it was converted into, once.

    Raises:
        ModelError: the draft is damaged, does not fit its target, or is no Llama or Qwen2.
    """
    weights, target = integer_sources(spec)
    key = f"{file_digest(weights)[:16]}-{content_key(target)}"
    directory = cache_root() / "models" / f"{weights.stem}-{key}-{FORMAT}"

    def write(scratch: Path) -> None:
        from engines.torch.conversion import save_tokenizer  # noqa: PLC0415 - as `convert_trimmed`

        convert_trimmed(weights, target).save(scratch)
        save_tokenizer(target, scratch)

    made_once(
        directory, lambda: write_complete(directory, write), f"cannot convert the draft {weights}",
        "expected the draft of this target, and a directory with room for its weights",
    )  # fmt: skip
    return directory, IntegerDecoder.load(directory)


def integer_sources(spec: str) -> tuple[Path, ModelSource]:
    """Weights and target of the shipped draft or of a draft directory, as `convert_trimmed` takes
    them."""
    if spec == DEFAULT_SPEC:
        return shipped_weights(), find_source(DEFAULT_SPEC)
    return Path(spec).expanduser() / DRAFT_WEIGHTS, find_source(spec)


def convert_trimmed(weights: Path, target: ModelSource, widest: bool = False) -> IntegerDecoder:
    """A trimmed draft in int8.

    Args:
        widest: with a head of every token, where the head's rows are those of the embedding.

    Raises:
        ModelError: as `load_integer_trimmed`.
    """
    # Here because a draft that was converted already needs none of what it loads.
    from engines.torch.conversion import read_config, weights_of  # noqa: PLC0415

    stored = load_file(weights)
    vocab = stored.pop("vocab")
    layers = dequantise(stored, torch.float32)
    config = read_config(target)
    if not has_llama_config(config):
        raise misfit(weights, f"a {config.model_type} does not run in int8; use float32")
    if target.gguf is not None:
        frozen = {_EMBEDDING: weights_of(target, config).get(_TARGET_EMBEDDING)}
        config.num_hidden_layers = depth(layers, weights)
    else:
        frozen = {name: rows.float() for name, rows in _frozen(Path(target.location)).items()}
    embedding = frozen[_EMBEDDING]
    if embedding is None:
        raise misfit(weights, "the target has no embedding")
    check_vocab(vocab, embedding.shape[0], weights)
    head = frozen.get(HEAD_KEY)
    if head is None:
        vocab = torch.arange(len(embedding)) if widest else vocab
        head = embedding[vocab.long()]
    state = MappedWeights({**layers, _EMBEDDING: embedding}, prefix="model.")
    return convert(config, state, head, vocab.int())


def _frozen(target: Path) -> dict[str, Tensor]:
    """What the draft has from its target: the embedding, and the head where it is not tied."""
    if (target / EMBEDDING_WEIGHTS).is_file():
        return load_file(target / EMBEDDING_WEIGHTS)
    with safe_open(target / _TARGET_WEIGHTS, "pt") as file:
        return {_EMBEDDING: file.get_tensor(_TARGET_EMBEDDING)}


def _draft_config(target: Path, layers: dict[str, Tensor], weights: Path) -> PreTrainedConfig:
    """The target's config, as deep as the draft."""
    if (target / EMBEDDING_WEIGHTS).is_file():
        return AutoConfig.from_pretrained(target)
    # Here because a draft in int8 does not: this class is slow to import.
    from transformers import LlamaConfig  # noqa: PLC0415

    config = LlamaConfig.from_pretrained(target)
    config.num_hidden_layers = depth(layers, weights)
    return config


def _build_body(
    config: PreTrainedConfig, state: dict[str, Tensor], dtype: torch.dtype, weights: Path
) -> torch.nn.Module:
    try:
        body, info = MODEL_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:
        raise misfit(weights, first_line(error)) from error
    for kind, names in info.items():
        if names:
            raise misfit(weights, f"{kind}, among them {min(map(str, names))}")
    ready: torch.nn.Module = body.eval().requires_grad_(False)
    return ready
