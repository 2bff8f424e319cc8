"""From a model spec to a place transformers can load.

`engines.catalog.sources` says what a spec is and where its files are. For a model in floating point
a GGUF file is turned once into an ordinary transformers directory (float32) in the user's cache,
because transformers needs half a minute and more to read one and a fifth of a second to read the
copy; `engines.torch.conversion` does the same for int8.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from bus.protocol.errors import ModelError
from engines.catalog.digests import file_digest
from engines.catalog.places import cache_root
from engines.catalog.sources import ModelSource, find_source

_FORMAT = "v2"  # raised when the converted copy must look different
_log = logging.getLogger(__name__)


class RefusedError(ModelError):
    """A model that can be read, and not run: its text says why, and what to do."""


def resolve_source(spec: str) -> ModelSource:
    """The directory or Hugging Face id to load `spec` from in floating point, after converting a
    GGUF file where needed.

    Raises:
        ModelError: nothing usable there; the message says what to do.
    """
    source = find_source(spec)
    return source if source.gguf is None else _in_float32(source.gguf)


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
        ModelError: `make` raised something. A RefusedError stays as it is.
    """
    if directory.is_dir():
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not directory.is_dir():  # another process may have been first
                make()
    except RefusedError:
        raise
    except Exception as error:  # a damaged file can raise anything in its parser
        raise ModelError(f"{failed}: {first_line(error)}; {expected}") from error


def first_line(error: Exception) -> str:
    """The beginning of an exception's text, which in transformers may run over many lines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _convert(path: Path, directory: Path) -> None:
    # Here because a start that finds the copy reads no GGUF file.
    from engines.torch.gguf_config import read_gguf_config  # noqa: PLC0415
    from engines.torch.gguf_tokenizer import save_gguf_tokenizer, without_progress  # noqa: PLC0415

    _log.info("converting %s once, about 30 s; the copy is kept in %s", path.name, directory)

    def write(scratch: Path) -> None:
        config = read_gguf_config(path)
        with without_progress():
            model = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.float32, config=config
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
