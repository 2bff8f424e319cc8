"""Converts models to int8, once, into the user's cache; `engines.torch.converted` reads them.

Llama and Qwen2 models are converted matrix by matrix (`engines.torch.integer_decoder`), from a GGUF
file, a directory or the Hugging Face hub. A directory that was converted is itself a model.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from bus.protocol.errors import ModelError
from engines.catalog.sources import ModelSource
from engines.torch.gguf_config import read_gguf_config
from engines.torch.gguf_tokenizer import save_gguf_tokenizer
from engines.torch.gguf_weights import GgufWeights
from engines.torch.integer_decoder import convert
from engines.torch.llama import has_llama_config
from engines.torch.sources import (
    RefusedError,
    first_line,
    forget_quantisation,
    made_once,
    write_complete,
)
from engines.torch.weights import DirectoryWeights, Weights

_GENERATION = "generation_config.json"
_log = logging.getLogger(__name__)


def read_config(source: ModelSource) -> Any:
    """transformers' config of a model on this machine.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        if source.gguf is None:
            return AutoConfig.from_pretrained(source.location)
        config = read_gguf_config(source.gguf)
    except RefusedError:
        raise
    except Exception as error:  # readers of configs raise what they like
        raise ModelError(
            f"cannot read the config of {source.location}: {first_line(error)}; expected a model "
            "that transformers can read"
        ) from error
    forget_quantisation(config)
    return config


def weights_of(source: ModelSource, config: Any) -> Weights:
    """The float32 tensors of a model on this machine.

    Raises:
        ModelError: there are none.
    """
    if source.gguf is not None:
        return GgufWeights(source.gguf, config)
    return DirectoryWeights(Path(source.location))


def save_tokenizer(source: ModelSource, directory: Path) -> None:
    """Write a model's tokenizer into a directory."""
    if source.gguf is not None:
        save_gguf_tokenizer(source.gguf, directory)
    else:
        AutoTokenizer.from_pretrained(source.location).save_pretrained(directory)


def convert_into(source: ModelSource, directory: Path) -> bool:
    """Convert a model on this machine, once; False where its architecture cannot be converted.

    Raises:
        ModelError: it cannot be read, or the directory cannot be written.
    """
    config = read_config(source)
    if not has_llama_config(config):
        return False

    def write(scratch: Path) -> None:
        convert(config, weights_of(source, config)).save(scratch)
        save_tokenizer(source, scratch)
        if source.gguf is None and (Path(source.location) / _GENERATION).is_file():
            shutil.copy(Path(source.location) / _GENERATION, scratch)

    def make() -> None:
        _log.info("converting %s to int8 once; the copy is kept in %s", source.name, directory)
        write_complete(directory, write)

    made_once(
        directory, make, f"cannot convert {source.location} into {directory}",
        "expected a Llama or Qwen2 model, and a directory with room for its weights",
    )  # fmt: skip
    return True
