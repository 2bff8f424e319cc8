"""The embedded Valkey: a real server that leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError

from bus.protocol.errors import ConfigurationError
from launch.embedded import EmbeddedServer, directories_of
from tests.launch.kept import KeptLog, is_running, wait_gone


async def test_starts_answers_and_leaves_nothing_behind(log: KeptLog) -> None:
    assert directories_of(os.getpid()) == []
    async with EmbeddedServer(log) as server:
        pid = server.process.pid
        async with Redis.from_url(server.url) as redis:
            await redis.xadd("stream", {"prompt": "hello"})
            assert await redis.xlen("stream") == 1
        assert len(directories_of(os.getpid())) == 1
    assert not is_running(pid)
    assert directories_of(os.getpid()) == []


async def test_nobody_reads_prompts_without_the_password(log: KeptLog) -> None:
    async with EmbeddedServer(log) as server:
        address = server.url.rpartition("@")[2]
        async with Redis.from_url(f"redis://{address}") as redis:
            with pytest.raises(AuthenticationError):
                await redis.ping()
        (directory,) = directories_of(os.getpid())
        assert (directory / "valkey.conf").stat().st_mode & 0o077 == 0


async def test_two_servers_do_not_collide(log: KeptLog) -> None:
    async with EmbeddedServer(log) as one, EmbeddedServer(log) as two:
        assert one.url != two.url
        async with Redis.from_url(one.url) as first, Redis.from_url(two.url) as second:
            await first.set("key", "one")
            assert await second.get("key") is None


async def test_a_killed_server_comes_back_with_its_data(log: KeptLog) -> None:
    async with EmbeddedServer(log) as server:
        url = server.url
        async with Redis.from_url(url) as redis:
            await redis.set("key", "value")
        os.kill(server.process.pid, signal.SIGKILL)
        await server.process.wait_started(2)
        assert server.url == url
        async with Redis.from_url(url, socket_connect_timeout=1) as redis:
            await until_answering(redis)
            assert await redis.get("key") == b"value"


async def until_answering(redis: Redis) -> None:
    from redis.exceptions import ConnectionError as RedisConnectionError

    while True:
        try:
            await redis.ping()
        except (RedisConnectionError, OSError):
            continue
        return


async def test_a_given_directory_keeps_the_data_and_is_used_by_one(
    log: KeptLog, tmp_path: Path
) -> None:
    directory = tmp_path / "data"
    async with EmbeddedServer(log, directory) as server:
        async with Redis.from_url(server.url) as redis:
            await redis.set("key", "value")
        with pytest.raises(ConfigurationError, match="another e2sci uses"):
            await EmbeddedServer(log, directory).start()
    async with EmbeddedServer(log, directory) as server, Redis.from_url(server.url) as redis:
        assert await redis.get("key") == b"value"


async def test_an_unusable_directory_is_a_clear_error(log: KeptLog, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        await EmbeddedServer(log, tmp_path / "file").start()


SCRIPT = """
import asyncio
from launch.embedded import EmbeddedServer
async def main():
    async with EmbeddedServer(lambda line: None) as server:
        print("pid", server.process.pid, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


def test_after_kill_9_the_server_is_gone_and_the_next_one_cleans_up(
    log: KeptLog, request: pytest.FixtureRequest
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        cwd=request.config.rootpath,
        text=True,
    ) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline().split()[1])
        orphan = directories_of(supervisor.pid)
        assert len(orphan) == 1
        supervisor.kill()
    wait_gone([pid])
    asyncio.run(start_and_stop(log))
    assert not orphan[0].exists()


async def start_and_stop(log: KeptLog) -> None:
    async with EmbeddedServer(log):
        pass
