"""Load a causal language model and its tokenizer from a spec.

What a spec may be stands in `models.sources`, number formats and devices in `models.precision`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from bus.errors import ModelError
from models.cache import require_croppable
from models.precision import resolve_device, resolve_dtype
from models.sources import ModelSource, first_line, resolve_source
from models.tokenizer import eos_token_ids, num_real_tokens, tokenizer_digest

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and what the rest of the project asks about it.

    Attributes:
        model: in evaluation mode, on `device`, in `dtype`.
        name: for people and the worker registry.
        context_length: most positions the model was made for.
        vocab_size: number of real tokens; logits beyond are padding (DESIGN rule 8).
        eos_tokens: ids that end an answer.
        tokenizer_digest: equal on two models exactly if they mean the same by every id.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str
    dtype: torch.dtype
    device: torch.device
    context_length: int
    vocab_size: int
    eos_tokens: frozenset[int]
    tokenizer_digest: str


def load_causal_lm(spec: str, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Load a target, or a draft that is a whole model of its own.

    Args:
        spec: `default`, a directory, a `.gguf` file or a Hugging Face id.
        dtype: one of `models.precision.DTYPE_CHOICES`.
        device: one of `models.precision.DEVICE_CHOICES`.

    Raises:
        ModelError: no such model, or one that cannot take part.
        ConfigurationError: unknown dtype or device.
    """
    where = resolve_device(device)
    number_format = resolve_dtype(dtype, where)
    quiet_transformers()
    source = resolve_source(spec)
    tokenizer = load_tokenizer(source)
    model = _load_model(source, number_format, where)
    require_croppable(model.config, source.name)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=source.name,
        dtype=number_format,
        device=where,
        context_length=context_length(model.config, source.name),
        vocab_size=num_real_tokens(tokenizer, model.config.get_text_config().vocab_size),
        eos_tokens=eos_token_ids(model, tokenizer),
        tokenizer_digest=tokenizer_digest(tokenizer),
    )


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """The tokenizer alone.

    Raises:
        ModelError: none there, or it cannot be read.
    """
    quiet_transformers()
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=False
        )
    except Exception as error:  # hub, file formats and custom classes can raise anything
        raise _cannot_load("tokenizer", source, error) from error
    return tokenizer


def context_length(config: Any, name: str) -> int:
    """Most positions the model was made for.

    Raises:
        ModelError: the config does not say.
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int) or length < 2:
        raise ModelError(
            f"model {name!r} does not say its context length "
            "(max_position_embeddings in config.json); expected a whole number above 1"
        )
    return length


def quiet_transformers() -> None:
    """Keep progress bars and advice of transformers out of the workers' logs; errors still come
    as exceptions."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _load_model(source: ModelSource, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    if not source.is_local:
        _log.info("loading %s from the Hugging Face hub or its cache", source.name)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.location, dtype=dtype, trust_remote_code=False
        )
    except Exception as error:  # as above
        raise _cannot_load("model", source, error) from error
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded


def _cannot_load(what: str, source: ModelSource, error: Exception) -> ModelError:
    reason = first_line(error)
    if source.is_local:
        return ModelError(f"cannot load the {what} in {source.location}: {reason}")
    return ModelError(
        f"cannot load the {what} {source.name!r}: it is no local directory, and the Hugging Face "
        f"hub or its cache did not give it ({reason}); check the name, or pass a path or 'default'"
    )
