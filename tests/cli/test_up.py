"""`e2sci up` as a user runs it: real workers on tiny random models."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cli.state import find_running
from tests.cli.conftest import e2sci, finish, invoke, start
from tests.engines.tiny import save_tiny
from tests.launch.kept import is_running, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny(folder / "target", num_layers=2)
    draft = save_tiny(folder / "draft", num_layers=1)
    return ["up", "--json", "--target", str(target), "--draft", str(draft), "--threads", "1"]


BARE = ["up", "--json", "--cloud", "0", "--edge", "0"]
"""No models, so it starts at once; supervision is the same for every process."""


class Up:
    """A running `e2sci up --json`."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, Any]) -> None:
        self.process = process
        self.ready = ready

    @property
    def pids(self) -> list[int]:
        return list(self.ready["processes"].values())


@pytest.fixture
async def ups() -> AsyncIterator[list[Up]]:
    started: list[Up] = []
    yield started
    for up in started:
        if up.process.returncode is None:
            up.process.kill()
            await up.process.wait()


async def begin(ups: list[Up], flags: list[str]) -> Up:
    process = await start(*flags)
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        pytest.fail((await finish(process)).err)
    up = Up(process, json.loads(line))
    ups.append(up)
    return up


@pytest.mark.long
async def test_from_start_to_ctrl_c(ups: list[Up], flags: list[str]) -> None:
    up = await begin(ups, [*flags, "--edge", "2", "--middle", "1", "--link", "2ms"])
    ready = up.ready
    names = {
        "valkey", "controller", "link-1", "cloud-1", "middle-1", "edge-1", "edge-2", "gateway",
        "dashboard",
    }  # fmt: skip
    assert ready["processes"].keys() == names
    assert ready["workers"]["cloud-1"]["endpoints"].keys() == {"windows", "feedback"}
    assert ready["workers"]["middle-1"]["role"] == "middle"
    state = find_running()
    assert state is not None
    assert (state.pid, state.redis_url) == (up.process.pid, ready["redis_url"])
    with urllib.request.urlopen(ready["dashboard_url"]) as page:  # noqa: ASYNC210
        assert page.status == 200
    with urllib.request.urlopen(ready["gateway_url"] + "/health") as page:  # noqa: ASYNC210
        assert json.load(page)["ready"] is True

    answer = await e2sci("submit", "the cat", "--max-new-tokens", "6", "--json")
    assert answer.status == 0, answer.err
    end = json.loads(answer.out.splitlines()[-1])
    assert end["usage"]["completion_tokens"] <= 6

    os.kill(ready["processes"]["edge-1"], signal.SIGKILL)
    assert up.process.stderr is not None
    while b"killed by SIGKILL; starting it again in 0.5 s" not in (
        line := await up.process.stderr.readline()
    ):
        assert line

    up.process.send_signal(signal.SIGINT)
    done = await finish(up.process)
    assert done.status == 0
    assert "stopping" in done.err
    assert "Traceback" not in done.err
    assert not any(is_running(pid) for pid in up.pids)
    assert find_running() is None


async def test_kill_9_leaves_no_process(ups: list[Up]) -> None:
    up = await begin(ups, BARE)
    up.process.kill()
    await up.process.wait()
    await until(lambda: not any(is_running(pid) for pid in up.pids))
    assert find_running() is None


@pytest.mark.long
async def test_two_at_once_do_not_collide(ups: list[Up]) -> None:
    one, two = await asyncio.gather(begin(ups, BARE), begin(ups, BARE))
    assert one.ready["redis_url"] != two.ready["redis_url"]
    assert one.ready["dashboard_url"] != two.ready["dashboard_url"]
    assert one.ready["gateway_url"] != two.ready["gateway_url"]
    for up in (one, two):
        done = await e2sci("status", "--json", "--redis-url", up.ready["redis_url"])
        workers = {worker["worker_id"] for worker in json.loads(done.out)["workers"]}
        assert workers == {"controller"}
        up.process.send_signal(signal.SIGTERM)
    assert [(await finish(up.process)).status for up in (one, two)] == [0, 0]


async def test_a_second_ctrl_c_kills_at_once(ups: list[Up]) -> None:
    up = await begin(ups, [*BARE, "--no-dashboard", "--no-gateway"])
    controller = psutil.Process(up.ready["processes"]["controller"])
    controller.suspend()  # it will not answer SIGTERM
    up.process.send_signal(signal.SIGINT)
    assert up.process.stderr is not None
    while b"stopping" not in (line := await up.process.stderr.readline()):
        assert line
    up.process.send_signal(signal.SIGINT)
    done = await finish(up.process)
    assert done.status == 0
    assert "still running" not in done.err
    assert not any(is_running(pid) for pid in up.pids)


async def test_a_given_redis_is_used_and_ids_are_unique_there(
    ups: list[Up], flags: list[str], valkey_url: str, key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("E2SCI_REDIS_URL", valkey_url)
    monkeypatch.setenv("E2SCI_KEY_PREFIX", key_prefix)
    up = await begin(ups, [*BARE, "--no-dashboard", "--no-gateway"])
    assert "valkey" not in up.ready["processes"]
    assert up.ready["redis_url"] == valkey_url
    worker_id = up.ready["workers"]["controller"]["worker_id"]
    assert worker_id.startswith("controller-")
    assert (await e2sci("status", "--worker", worker_id)).status == 0


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--redis-url", "redis://127.0.0.1:1/0"], "does not answer"),
        (["--redis-url", "redis://127.0.0.1:1/0", "--data-dir", "x"], "--data-dir is for"),
        (["--link", "6g"], "there is no link '6g'"),
    ],
)
def test_what_cannot_start_fails_with_a_clear_last_line(extra: list[str], words: str) -> None:
    done = invoke(*BARE, "--no-dashboard", "--no-gateway", *extra)
    assert done.status == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert find_running() is None


@pytest.mark.long
async def test_a_data_directory_outlives_the_run(ups: list[Up], tmp_path: Path) -> None:
    directory = tmp_path / "data"
    keep = [*BARE, "--no-dashboard", "--no-gateway", "--data-dir", str(directory)]
    up = await begin(ups, keep)
    waiting = await start("submit", "the cat")
    assert waiting.stderr is not None
    assert b"no edge worker" in await waiting.stderr.readline()
    status = await e2sci("status", "--json")
    while json.loads(status.out)["queue"]["length"] == 0:
        status = await e2sci("status", "--json")
    waiting.kill()
    await waiting.wait()
    up.process.send_signal(signal.SIGINT)
    assert (await finish(up.process)).status == 0
    await begin(ups, keep)
    status = await e2sci("status", "--json")
    assert json.loads(status.out)["queue"]["length"] == 1
