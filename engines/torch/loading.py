"""Load a causal language model and its tokenizer from a spec.

Specs are resolved in `engines.torch.sources`, number formats and devices in
`engines.torch.precision`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from bus.protocol.errors import ModelError
from engines.catalog.registry import is_registered, load_registry
from engines.catalog.sources import ModelSource, find_source
from engines.tokenizer import eos_token_ids, num_real_tokens, tokenizer_digest
from engines.torch.cache import require_croppable
from engines.torch.converted import is_converted, load_integer, on_disk
from engines.torch.integer_decoder import IntegerDecoder, read_converted_config
from engines.torch.precision import (
    NumberFormat,
    resolve_device,
    resolve_dtype,
    resolve_format,
    torch_dtype,
)
from engines.torch.sources import first_line, resolve_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What the rest of the project asks about a model that was loaded.

    Attributes:
        name: for people and the worker registry.
        context_length: most positions the model was made for.
        vocab_size: number of real tokens; logits beyond are padding.
        tokenizer_digest: equal on two models exactly if every id means the same to both.
    """

    tokenizer: Tokenizer
    name: str
    dtype: NumberFormat
    device: torch.device
    context_length: int
    vocab_size: int
    tokenizer_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel(Loaded):
    """A model ready to run.

    Attributes:
        model: in evaluation mode, on `device`, in `dtype`; an `IntegerDecoder` where it was
            converted to int8. In int8 without conversion: float32, with matrices yet to be rounded.
        eos_tokens: ids that end an answer.
    """

    model: Any  # both are read in ways that the other lacks
    eos_tokens: frozenset[int]


def load_model(
    spec: str, dtype: str = "auto", device: str = "auto", *, bitwise_int8: bool = False
) -> LoadedModel:
    """Load a model to run it, as a target or as a draft that is a whole model of its own.

    Args:
        spec: `default`, a registered name, a directory, a `.gguf` file or a Hugging Face id.
        dtype: one of `engines.torch.precision.DTYPE_CHOICES`.
        device: one of `engines.torch.precision.DEVICE_CHOICES`.
        bitwise_int8: refuse int8 where rows would depend on the rows beside them, before any
            weights are read.

    Raises:
        ModelError: no such model, or one that cannot take part.
        ConfigurationError: unknown dtype or device, or int8 where it does not run.
    """
    where = resolve_device(device)
    number_format = resolve_format(dtype, where, is_registered(spec) or is_converted(spec))
    if number_format is not NumberFormat.INT8:
        if dtype == "auto" and where.type == "cpu":
            _log.info("%s runs in %s; --dtype int8 is faster on this CPU", spec, number_format)
        return _load_float(spec, number_format, where)
    quiet_transformers()
    found = load_integer(spec)
    if found is None and bitwise_int8:
        raise _no_bitwise_int8(spec)
    if found is None:
        return replace(_load_float(spec, NumberFormat.FLOAT32, where), dtype=NumberFormat.INT8)
    source, decoder = found
    return _described(spec, source, decoder, number_format, where)


def _no_bitwise_int8(spec: str) -> ModelError:
    """Why a target cannot run in int8: its rounded activations differ between passes of several
    rows and of one, which no bound for float32 excuses."""
    # Here because a model that was converted needs neither.
    from engines.torch.conversion import read_config  # noqa: PLC0415
    from engines.torch.llama import missing_parts  # noqa: PLC0415

    source = on_disk(find_source(spec))
    missing = ", ".join(missing_parts(read_config(source)))
    return ModelError(
        f"{source.name!r} cannot be a target in int8: the int8 engine lacks {missing}; use "
        "--dtype float32 or bfloat16"
    )


def load_causal_lm(spec: str, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Load a model of transformers in floating point: to train, to read with, to compare with.

    Arguments as for `load_model`, without int8.

    Raises:
        ModelError: no such model, or one that cannot take part.
        ConfigurationError: unknown dtype or device.
    """
    where = resolve_device(device)
    number_format = str(resolve_dtype(dtype, where)).removeprefix("torch.")
    return _load_float(spec, NumberFormat(number_format), where)


def _load_float(spec: str, number_format: NumberFormat, device: torch.device) -> LoadedModel:
    quiet_transformers()
    source = resolve_source(spec)
    model = _load_model(source, torch_dtype(number_format), device)
    require_croppable(model.config, source.name)
    return _described(spec, source, model, number_format, device)


def _described(
    spec: str, source: ModelSource, model: PreTrainedModel | IntegerDecoder,
    number_format: NumberFormat, device: torch.device,
) -> LoadedModel:  # fmt: skip
    tokenizer = load_tokenizer(source)
    config = model.config
    generation = getattr(model, "generation_config", None) or _generation_config(source)
    known = load_registry().models.get(spec)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=source.name,
        dtype=number_format,
        device=device,
        context_length=context_length(config, source.name),
        vocab_size=num_real_tokens(tokenizer, config.get_text_config().vocab_size),
        eos_tokens=eos_token_ids(generation, config, tokenizer, known.eos if known else ()),
        tokenizer_digest=tokenizer_digest(tokenizer),
    )


def _generation_config(source: ModelSource) -> GenerationConfig | None:
    """That of a directory, where it has one."""
    if not (Path(source.location) / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(source.location)


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """The tokenizer alone.

    Raises:
        ModelError: none there, or it cannot be read.
    """
    quiet_transformers()
    try:
        # Given no config, transformers reads it again, and imports the class of its model type.
        config = load_config(source) if is_converted(source.location) else None
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=False, config=config
        )
    except Exception as error:  # hub, file formats and custom classes can raise anything
        raise _cannot_load("tokenizer", source, error) from error
    return tokenizer


def load_config(source: ModelSource) -> Any:
    """transformers' config of a model, without any model's module where it was converted."""
    if is_converted(source.location):
        return read_converted_config(Path(source.location))
    return AutoConfig.from_pretrained(source.location)


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
