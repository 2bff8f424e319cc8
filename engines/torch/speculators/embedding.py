"""What a draft at the edge has from its target: the tokenizer and the input embedding.

They are copied once into the user's cache, without the rest of the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bus.protocol.errors import ModelError
from engines.catalog.places import cache_root
from engines.catalog.sources import ModelSource, find_source
from engines.tokenizer import num_real_tokens, tokenizer_digest
from engines.torch.converted import content_key, on_disk
from engines.torch.loading import (
    Loaded,
    context_length,
    load_config,
    load_tokenizer,
    quiet_transformers,
)
from engines.torch.precision import NumberFormat
from engines.torch.sources import made_once, write_complete

_FILE, _KEY = "embedding.safetensors", "embed_tokens.weight"
_FORMAT = "embedding-v1"  # raised when the copy must look different


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEmbedding(Loaded):
    """Of a target.

    Attributes:
        embedding: float16[V, hidden], in the model's own basis.
    """

    embedding: Tensor


def load_embedding(spec: str) -> LoadedEmbedding:
    """Of the target of a spec.

    Raises:
        ModelError: no such model, or it has no input embedding by the usual name.
    """
    quiet_transformers()
    source = on_disk(find_source(spec))
    directory = cache_root() / "models" / f"{source.name}-{content_key(source)}-{_FORMAT}"
    made_once(
        directory, lambda: write_complete(directory, lambda scratch: _copy(source, scratch)),
        f"cannot copy the embedding of {source.name!r} into {directory}",
        "expected a model that transformers can read, and a directory with room for it",
    )  # fmt: skip
    copied = ModelSource(name=source.name, location=str(directory), is_local=True)
    tokenizer, config = load_tokenizer(copied), load_config(copied)
    return LoadedEmbedding(
        embedding=load_file(directory / _FILE)[_KEY],
        tokenizer=tokenizer,
        name=source.name,
        dtype=NumberFormat.INT8,
        device=torch.device("cpu"),
        context_length=context_length(config, source.name),
        vocab_size=num_real_tokens(tokenizer, config.get_text_config().vocab_size),
        tokenizer_digest=tokenizer_digest(tokenizer),
    )


def _copy(source: ModelSource, scratch: Path) -> None:
    # Here because an embedding that was copied already needs none of what it loads.
    from engines.torch.conversion import read_config, save_tokenizer, weights_of  # noqa: PLC0415

    config: Any = read_config(source)
    rows = weights_of(source, config).get(f"model.{_KEY}")
    if rows is None:
        raise ModelError(f"{source.name!r} has no tensor model.{_KEY}")
    save_file({_KEY: rows.half().contiguous()}, scratch / _FILE)
    config.save_pretrained(scratch)
    save_tokenizer(source, scratch)
