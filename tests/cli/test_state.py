from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec
import psutil
import pytest

from cli.state import RunningStack, StateFile, find_running, state_dir

if TYPE_CHECKING:
    from pathlib import Path

URL = "redis://:secret@127.0.0.1:1/0"


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def put(stack: RunningStack) -> Path:
    path = state_dir() / f"up-{stack.pid}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.encode(stack))
    return path


def test_written_found_and_removed() -> None:
    assert find_running() is None
    state = StateFile()
    path = state.write(redis_url=URL, dashboard_url="http://127.0.0.1:8501")
    found = find_running()
    assert found is not None
    assert (found.pid, found.redis_url) == (os.getpid(), URL)
    assert found.dashboard_url == "http://127.0.0.1:8501"
    assert path.stat().st_mode & 0o077 == 0
    assert list(path.parent.iterdir()) == [path]
    state.remove()
    assert find_running() is None
    assert list(path.parent.iterdir()) == []


def test_the_file_of_a_dead_process_is_ignored_and_removed() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        started_at = psutil.Process(child.pid).create_time()
    path = put(RunningStack(child.pid, started_at, URL))
    assert find_running() is None
    assert not path.exists()


def test_a_reused_pid_is_not_taken_for_the_dead_process() -> None:
    put(RunningStack(os.getpid(), psutil.Process().create_time() - 3600, URL))
    assert find_running() is None


def test_the_latest_of_two_is_found_and_the_other_when_it_ends() -> None:
    mine = StateFile()
    mine.write(redis_url="redis://mine")
    code = "import time; time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        put(RunningStack(child.pid, psutil.Process(child.pid).create_time(), "redis://later"))
        found = find_running()
        assert found is not None
        assert found.redis_url == "redis://later"
        child.kill()
    found = find_running()
    assert found is not None
    assert found.redis_url == "redis://mine"


def test_a_file_of_another_release_is_left_alone() -> None:
    state_dir().mkdir()
    path = state_dir() / "up-1.json"
    path.write_text('{"pid": 1, "something": "else"}')
    assert find_running() is None
    assert path.exists()


def test_without_a_runtime_directory_the_home_directory_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", str(tmp_path / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        assert state_dir() == tmp_path / ".local/state/e2sci"
