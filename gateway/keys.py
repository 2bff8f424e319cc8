"""API keys: 256 random bits each, of which a file keeps SHA-256 hashes, one `name:sha256$hex` a
line.

A key is as random as its hash, so a slow hash would protect nothing more. The file belongs to its
owner alone (mode 0600) and is read again when it changes: keys are added and removed while the
gateway runs.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from bus.protocol.errors import ConfigurationError

__all__ = ["KeyFile", "Keys", "default_keys_file"]

log = logging.getLogger(__name__)

_PREFIX = "sk-e2sci-"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LINE = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64}):sha256\$(?P<hash>[0-9a-f]{64})")


def default_keys_file() -> Path:
    """`$XDG_CONFIG_HOME/e2sci/api-keys`, or the same under `~/.config`."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "e2sci" / "api-keys"


class KeyFile:
    """The file, for `e2sci keys`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, str]:
        """Hashes by name, in the file's order.

        Raises:
            ConfigurationError: the file cannot be read, or a line is wrong.
        """
        try:
            if self.path.exists() and not self.path.is_file():  # a pipe would never end
                raise OSError("it is no regular file")
            lines = self.path.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"API keys: {self.path} cannot be read: {error}; make it with `e2sci keys add NAME`"
            ) from error
        hashes: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            found = _LINE.fullmatch(line.strip())
            if found is None:
                raise ConfigurationError(
                    f"API keys: {self.path}, line {number}: expected name:sha256$ and 64 "
                    "hexadecimal digits"
                )
            hashes[found["name"]] = found["hash"]
        return hashes

    def add(self, name: str) -> str:
        """Make a key and store its hash; returns the key, which is kept nowhere.

        Raises:
            ConfigurationError: the name is wrong or in use, or the file cannot be used.
        """
        if not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"expected a name of 1 … 64 of A-Z a-z 0-9 _ . -, got {name!r}"
            )
        hashes = self.read() if self.path.exists() else {}
        if name in hashes:
            raise ConfigurationError(f"a key {name!r} exists; remove it first, or choose another")
        key = _PREFIX + secrets.token_urlsafe(32)
        self._write({**hashes, name: _hash(key)})
        return key

    def remove(self, name: str) -> None:
        """Forget a key: requests with it are refused from the next one on.

        Raises:
            ConfigurationError: there is none of this name, or the file cannot be used.
        """
        hashes = self.read()
        if hashes.pop(name, None) is None:
            raise ConfigurationError(f"there is no key {name!r} in {self.path}")
        self._write(hashes)

    def _write(self, hashes: dict[str, str]) -> None:
        """The whole file or nothing, readable by its owner alone."""
        draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.touch(mode=0o600)
            draft.write_text("".join(f"{name}:sha256${hash_}\n" for name, hash_ in hashes.items()))
            draft.rename(self.path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise ConfigurationError(f"API keys: {self.path} cannot be written: {error}") from error


class Keys:
    """The keys a gateway accepts.

    Raises (from the constructor):
        ConfigurationError: as `KeyFile.read`, or the file holds no key.
    """

    def __init__(self, path: Path) -> None:
        self._file = KeyFile(path)
        self._stamp: tuple[int, int] | None = None
        self._names: dict[str, str] = {}
        self._trouble = ""
        self._refresh()
        if not self._names:
            raise ConfigurationError(f"API keys: {path} holds none; `e2sci keys add NAME` adds one")

    def name_of(self, authorization: str) -> str | None:
        """The name of the key in an `Authorization` header, None where it is no key of ours.

        What is looked up is a hash, so the time it takes says nothing about a key.
        """
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        try:
            self._refresh()
        except ConfigurationError as error:  # what was read last goes on to count
            if str(error) != self._trouble:
                log.warning("%s; the keys read before go on to count", error)
            self._trouble = str(error)
        return self._names.get(_hash(key.strip()))

    def _refresh(self) -> None:
        try:
            found = self._file.path.stat()
            stamp = (found.st_mtime_ns, found.st_ino)
        except OSError:
            stamp = None
        if stamp is None or stamp != self._stamp:
            self._names = {hash_: name for name, hash_ in self._file.read().items()}
            self._stamp = stamp
        self._trouble = ""


def _hash(key: str) -> str:
    return sha256(key.encode("utf-8", "replace")).hexdigest()
