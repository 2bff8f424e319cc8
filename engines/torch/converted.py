"""Models that were converted to int8: found in the user's cache, and read in seconds.

What converts them, `engines.torch.conversion`, is loaded only where none is found: it needs
transformers' models and readers of GGUF files, which take longer to import than everything a
worker of a converted model runs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download

from bus.protocol.errors import ModelError
from engines.catalog.digests import file_digest
from engines.catalog.places import cache_root
from engines.catalog.sources import ModelSource, find_source
from engines.torch.integer_decoder import FORMAT, INTEGER_WEIGHTS, IntegerDecoder
from engines.torch.sources import first_line

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model")  # of a model's directory


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
        if not directory.is_dir() and not _converted(source, directory):
            return None
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


def content_key(source: ModelSource) -> str:
    """Digest of a model's weights, config and tokenizer."""
    if source.gguf is not None:
        return file_digest(source.gguf)[:16]
    directory = Path(source.location)
    files = sorted(path for pattern in _FILES for path in directory.glob(pattern))
    digests = {path.name: file_digest(path) for path in files}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def _converted(source: ModelSource, directory: Path) -> bool:
    """Convert a model into a directory; False where its architecture cannot be converted."""
    from engines.torch.conversion import convert_into  # noqa: PLC0415 - see above

    return convert_into(source, directory)
