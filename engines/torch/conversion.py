"""Models in int8: converted once into the user's cache, then read in seconds.

Llama and Qwen2 models are converted matrix by matrix (`engines.torch.integer_decoder`), from a GGUF
file, a directory or the Hugging Face hub. A directory that was converted is itself a model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer

from bus.protocol.errors import ModelError
from engines.catalog.digests import file_digest
from engines.catalog.places import cache_root
from engines.torch.gguf_tokenizer import save_gguf_tokenizer, without_progress
from engines.torch.integer_decoder import FORMAT, INTEGER_WEIGHTS, IntegerDecoder, convert
from engines.torch.llama import has_llama_config
from engines.torch.sources import (
    ModelSource,
    find_source,
    first_line,
    forget_quantisation,
    made_once,
    write_complete,
)
from engines.torch.weights import DirectoryWeights, GgufWeights, Weights

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model")  # of a model's directory
_GENERATION = "generation_config.json"
_log = logging.getLogger(__name__)


def load_integer(spec: str) -> tuple[ModelSource, IntegerDecoder] | None:
    """A model in int8, and the directory of its config and tokenizer; None where its architecture
    is not one that can be converted.

    Raises:
        ModelError: no such model, or one that cannot be read.
    """
    source = on_disk(find_source(spec))
    directory = Path(source.location)
    if not (directory / INTEGER_WEIGHTS).is_file():
        directory = cache_root() / "models" / f"{source.name}-{content_key(source)}-{FORMAT}"
        if not directory.is_dir():  # reading a GGUF file's config takes as long as the whole start
            config = read_config(source)
            if not has_llama_config(config):
                return None
            _convert(source, config, directory)
    return ModelSource(source.name, str(directory), is_local=True), IntegerDecoder.load(directory)


def is_converted(spec: str) -> bool:
    """Whether a model spec is a directory that was converted to int8."""
    return (Path(spec).expanduser() / INTEGER_WEIGHTS).is_file()


def on_disk(source: ModelSource) -> ModelSource:
    """The source with a model of the Hugging Face hub fetched or found in its cache.

    Raises:
        ModelError: the hub did not give it.
    """
    if source.is_local:
        return source
    try:
        directory = snapshot_download(source.location, allow_patterns=list(_FILES))
    except Exception as error:  # hub clients raise what they like
        raise ModelError(
            f"cannot load the model {source.name!r}: it is no local directory, and the Hugging "
            f"Face hub or its cache did not give it ({first_line(error)}); check the name, or pass "
            "a path or 'default'"
        ) from error
    return ModelSource(source.name, directory, is_local=True)


def read_config(source: ModelSource) -> Any:
    """transformers' config of a model on this machine.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        if source.gguf is None:
            return AutoConfig.from_pretrained(source.location)
        with without_progress():
            config = AutoConfig.from_pretrained(str(source.gguf.parent), gguf_file=source.gguf.name)
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


def content_key(source: ModelSource) -> str:
    """Digest of a model's weights, config and tokenizer."""
    if source.gguf is not None:
        return file_digest(source.gguf)[:16]
    directory = Path(source.location)
    files = sorted(path for pattern in _FILES for path in directory.glob(pattern))
    digests = {path.name: file_digest(path) for path in files}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def _convert(source: ModelSource, config: Any, directory: Path) -> None:
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
