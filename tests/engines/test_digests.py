from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from engines.catalog.digests import file_digest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/e2sci/digests"


def test_a_digest_is_computed_once_for_a_files_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert file_digest(path) == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert file_digest(path) == hashlib.sha256(b"one").hexdigest()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path.write_bytes(b"two")  # as long as before
    os.utime(path, ns=(1, 1))
    assert file_digest(path) == hashlib.sha256(b"two").hexdigest()


def test_two_names_of_a_file_are_one(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert file_digest(tmp_path / "file") == file_digest(tmp_path / "link")
    assert len(list(own_cache.iterdir())) == 1


@pytest.mark.parametrize("record", [b"", b"{}", b"[]", b"null", b"\xff", b'{"path": 1}'])
def test_a_damaged_record_is_replaced(record: bytes, tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    file_digest(path)
    (kept,) = own_cache.iterdir()
    good = kept.read_bytes()
    kept.write_bytes(record)
    assert file_digest(path) == hashlib.sha256(b"one").hexdigest()
    assert kept.read_bytes() == good


def test_an_unwritable_cache_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"one").hexdigest()
