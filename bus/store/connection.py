"""The connection to Redis: timeouts, retries, scripts, and the place where errors are translated.

A command is retried a few times within about a second when the connection breaks, so every
command sent from this package must be safe to repeat: the reply may be lost after the command was
carried out. Scripts are written for that. What still fails becomes `StoreUnavailableError`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from hashlib import sha1
from importlib import resources
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from bus.protocol.errors import ConfigurationError, LocalError, StoreUnavailableError
from bus.settings import BusSettings

__all__ = ["MAX_BLOCK_MS", "CommandRefusedError", "Connection"]

MAX_BLOCK_MS = 5_000
"""Longest a blocking read may wait on the server; longer waits are made of several."""

_CONNECT_TIMEOUT_S = 2.0
_COMMAND_TIMEOUT_S = 5.0
_RETRIES = 3
_MAX_CONNECTIONS = 5_000
"""Of one process; each blocking read holds one. Servers take 10,000 clients by default."""
_SERVER_TROUBLE = ("MISCONF", "LOADING", "BUSY ", "NOREPLICAS", "MASTERDOWN")


class CommandRefusedError(LocalError):
    """Redis answered a command with an error: a bug here, or a foreign value under our key."""

    def has_code(self, code: str) -> bool:
        """Whether Redis' error code, the first word of its answer, is `code`."""
        return str(self.__cause__).startswith(f"{code} ")


class Connection:
    """A pool of connections, and how long a command may be silent.

    The time limits are ours and not redis-py's `socket_timeout`: that one waits in
    `asyncio.wait_for`, which on Python 3.11 now and then swallows the cancellation of a task.
    """

    def __init__(self, settings: BusSettings) -> None:
        self._where = settings.redacted_redis_url
        self._redis = _client(settings.redis_url)

    async def close(self) -> None:
        async with self._translated():
            await self._redis.aclose()

    async def execute(self, *command: Any, **options: Any) -> Any:
        """One command, by its words, with redis-py's options for its reply.

        Raises StoreUnavailableError.
        """
        async with self._translated():
            return await self._redis.execute_command(*command, **options)  # type: ignore[no-untyped-call]

    async def execute_blocking(self, *command: Any) -> Any:
        """One command that waits on the server, at most MAX_BLOCK_MS. Raises as `execute`."""
        async with self._translated(_COMMAND_TIMEOUT_S + MAX_BLOCK_MS / 1000):
            return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]

    async def execute_many(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Several commands in one round trip, not atomic. Raises as `execute`."""
        async with self._translated():
            pipeline: Pipeline = self._redis.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            return await pipeline.execute()

    async def run_script(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run `scripts/<name>.lua`; loads it where the server does not know it (any more)."""
        source, sha = _script(name)
        async with self._translated():
            try:
                return await self._redis.evalsha(sha, len(keys), *keys, *args)
            except NoScriptError:
                return await self._redis.eval(source, len(keys), *keys, *args)

    async def scan(self, pattern: str) -> list[bytes]:
        """All keys that match the glob `pattern`."""
        async with self._translated():
            return [key async for key in self._redis.scan_iter(match=pattern, count=1000)]

    @asynccontextmanager
    async def _translated(self, timeout_s: float = _COMMAND_TIMEOUT_S) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            raise StoreUnavailableError(
                f"Redis at {self._where} does not answer within {timeout_s:g} s; "
                "check that it runs and that redis_url (E2SCI_REDIS_URL) is right"
            ) from error
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise ConfigurationError(
                f"Redis at {self._where} refuses us: {error}; "
                "check user and password in redis_url (E2SCI_REDIS_URL)"
            ) from error
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            raise StoreUnavailableError(
                f"Redis at {self._where} does not answer: {error}; "
                "check that it runs and that redis_url (E2SCI_REDIS_URL) is right"
            ) from error
        except (ClusterDownError, OutOfMemoryError, ReadOnlyError) as error:
            raise StoreUnavailableError(
                f"Redis at {self._where} takes no writes: {error}"
            ) from error
        except RedisError as error:
            if str(error).startswith(_SERVER_TROUBLE):
                raise StoreUnavailableError(
                    f"Redis at {self._where} cannot serve now: {error}"
                ) from error
            raise CommandRefusedError(
                f"Redis at {self._where} refused a command: {error}"
            ) from error


def _client(url: str) -> Redis:
    return Redis.from_url(
        url,
        socket_timeout=None,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        socket_keepalive=True,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries=_RETRIES),
        max_connections=_MAX_CONNECTIONS,
        protocol=2,  # no handshake beyond AUTH and SELECT; every server speaks it
        decode_responses=False,  # a prompt may be no UTF-8, and must not break the reader
    )


@cache
def _script(name: str) -> tuple[str, str]:
    """Source and SHA-1 of a script, by which the server knows it."""
    source = resources.files("bus.store").joinpath("scripts", f"{name}.lua").read_text("utf-8")
    return source, sha1(source.encode(), usedforsecurity=False).hexdigest()
