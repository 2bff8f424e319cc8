"""`e2sci keys` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.keys import Keys
from tests.cli.conftest import invoke


def test_a_key_is_printed_once_and_works(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    added = invoke("keys", "add", "alice", "--file", str(file))
    assert added.status == 0
    [key] = added.out.splitlines()
    assert key not in added.err
    assert f"E2SCI_API_KEYS_FILE={file}" in added.err
    assert Keys(file).name_of(f"Bearer {key}") == "alice"
    assert invoke("keys", "list", "--file", str(file)).out == "alice\n"
    assert invoke("keys", "remove", "alice", "--file", str(file)).status == 0
    assert invoke("keys", "list", "--file", str(file)).out == ""


def test_without_a_file_it_is_the_settings_or_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert invoke("keys", "add", "alice").status == 0
    assert (tmp_path / "e2sci" / "api-keys").exists()
    monkeypatch.setenv("E2SCI_API_KEYS_FILE", str(tmp_path / "set"))
    assert invoke("keys", "add", "bob").status == 0
    assert (tmp_path / "set").read_text().startswith("bob:")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    done = invoke("keys", "remove", "bob", "--file", str(tmp_path / "none"))
    assert done.status == 1
    assert done.err.startswith("error: API keys: ")
