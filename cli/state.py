"""Where a later `e2sci submit` finds the Redis of a running `e2sci up`.

Each `up` writes one small file, readable by its user only (the URL holds a password), and removes
it at its end. A file whose process is gone is ignored and removed by whoever reads it.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import psutil

from bus.protocol.errors import ConfigurationError
from bus.settings import BusSettings

__all__ = [
    "RunningStack",
    "StateFile",
    "configured_redis_url",
    "find_running",
    "settings_to_reach",
    "state_dir",
]

_PATTERN = "up-*.json"
_SAME_PROCESS_S = 1.0
"""Start times of one process, read twice, differ by less than this."""


class RunningStack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One running `e2sci up`."""

    pid: int
    process_started_at: float  # seconds since the epoch; tells a reused pid apart
    redis_url: str
    dashboard_url: str | None = None

    @property
    def alive(self) -> bool:
        try:
            started_at = psutil.Process(self.pid).create_time()
        except psutil.NoSuchProcess:
            return False
        return abs(started_at - self.process_started_at) < _SAME_PROCESS_S


class StateFile:
    """This process's own file: written once ready, removed at the end."""

    def __init__(self) -> None:
        self._path: Path | None = None

    def write(self, *, redis_url: str, dashboard_url: str | None = None) -> Path:
        """Write the file, whole or not at all."""
        pid = os.getpid()
        stack = RunningStack(pid, psutil.Process(pid).create_time(), redis_url, dashboard_url)
        path = state_dir() / f"up-{pid}.json"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.unlink(missing_ok=True)
        draft.touch(mode=0o600)
        draft.write_bytes(msgspec.json.encode(stack))
        draft.rename(path)
        self._path = path
        return path

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None


def state_dir() -> Path:
    """`$XDG_RUNTIME_DIR/e2sci`, or `~/.local/state/e2sci` where that variable names no directory
    we can write."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK | os.X_OK):
        return Path(runtime) / "e2sci"
    return Path.home() / ".local" / "state" / "e2sci"


def find_running() -> RunningStack | None:
    """The `e2sci up` of this user that was started last, or None when none is running."""
    found: list[RunningStack] = []
    for path in state_dir().glob(_PATTERN):
        try:
            stack = msgspec.json.decode(path.read_bytes(), type=RunningStack)
        except FileNotFoundError:  # it ended just now
            continue
        except msgspec.DecodeError:  # of another release; not ours to judge
            continue
        if stack.alive:
            found.append(stack)
        else:
            path.unlink(missing_ok=True)
    return max(found, key=lambda stack: stack.process_started_at, default=None)


def configured_redis_url(option: str | None = None) -> str | None:
    """The Redis somebody named: by the option, in the environment or in the settings file.

    Raises:
        ConfigurationError: a setting is wrong.
    """
    if option is not None:
        return BusSettings.load(redis_url=option).redis_url
    settings = BusSettings.load()
    return settings.redis_url if "redis_url" in settings.model_fields_set else None


def settings_to_reach(option: str | None = None) -> BusSettings:
    """Settings with the Redis to use: a configured one, else that of the running `e2sci up`.

    Raises:
        ConfigurationError: nothing is configured and nothing runs, or a setting is wrong.
    """
    url = configured_redis_url(option)
    if url is None:
        stack = find_running()
        if stack is None:
            raise ConfigurationError(
                "nothing is running here; start `e2sci up` or set E2SCI_REDIS_URL"
            )
        url = stack.redis_url
    return BusSettings.load(redis_url=url)
