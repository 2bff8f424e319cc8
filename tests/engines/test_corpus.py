"""Texts of files, and rankings of the tokens in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from bus.protocol.errors import ConfigurationError
from engines.catalog import ranking
from engines.catalog.ranking import most_frequent, own_rankings, rank, save_ranking
from engines.tokenizer import tokenizer_digest
from engines.torch import corpus
from engines.torch.corpus import load_vocabulary, read_corpus
from engines.torch.loading import load_model
from tests.engines.tiny import byte_level_tokenizer, save_tiny, save_tiny_gguf

TOKENIZER = byte_level_tokenizer()


def texts(path: Path, content: str | bytes) -> list[tuple[str, int]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_corpus(path))


def test_all_strings_of_a_row_are_its_text_but_for_ids(tmp_path: Path) -> None:
    row = {"id": "x1", "task_id": "y", "question": "why", "n": 3, "choices": ["a\r\nb", {"c": "d"}]}
    line = json.dumps(row) + "\n"
    assert texts(tmp_path / "a.jsonl", line + "\n") == [("why\na\nb\nd", len(line))]


def test_plain_text_comes_in_pieces_that_end_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_PIECE_CHARS", 5)
    expected = [("abc\ndef\n", 9), ("g", 1)]
    assert texts(tmp_path / "a.txt", "abc\r\ndef\ng") == expected


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", "{}\n{", "line 2 is not JSON"),
        ("a.jsonl", "[1]", "line 1: expected a JSON object"),
        ("a.txt", b"ok\n\xff", "line 2 is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str | bytes, complaint: str
) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        texts(tmp_path / name, content)


def test_the_most_frequent_tokens_come_first_then_the_lowest_ids() -> None:
    first, second, *_ = TOKENIZER.encode("zy", add_special_tokens=False)
    found = rank(TOKENIZER, ["zzzyy", "z"], len(TOKENIZER), 6)
    rest = [token for token in range(8) if token not in (first, second)]
    assert found.ids.tolist() == [first, second, *rest[:4]]
    assert (found.counted, found.distinct, found.covered) == (6, 2, 1.0)
    assert rank(TOKENIZER, ["zzzyy", "z"], len(TOKENIZER), 1).covered == 4 / 6
    assert rank(TOKENIZER, [], len(TOKENIZER), 3).covered == 0.0


def test_a_vocabulary_is_the_models_own_from_a_directory_and_from_a_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = load_vocabulary(str(save_tiny(tmp_path / "tiny", TOKENIZER)))
    file = load_vocabulary(str(save_tiny_gguf(tmp_path / "tiny.gguf")))
    assert directory.size == file.size == len(TOKENIZER)
    for vocabulary, spec in ((directory, "tiny"), (file, "tiny.gguf")):
        loaded = load_model(str(tmp_path / spec), "float32")
        assert tokenizer_digest(vocabulary.tokenizer) == loaded.tokenizer_digest
    assert (directory.name, file.name) == ("tiny", "tiny")


def test_a_users_ranking_is_found_by_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    digest = tokenizer_digest(TOKENIZER)
    save_ranking(own_rankings() / "mine.safetensors", np.array([9, 5, 7], "int32"), digest)
    special = sorted(TOKENIZER.added_tokens_decoder)
    assert most_frequent(TOKENIZER, digest, len(special) + 2).tolist() == [*special, 5, 9]


def test_the_shipped_ranking_is_that_of_one_tokenizer() -> None:
    """Qwen2.5's: 151,643 tokens of text, each at most once."""
    shipped = Path(ranking.__file__).parent / "rankings" / "qwen2.5.safetensors"
    with safe_open(shipped, "np") as file:
        ids, metadata = file.get_tensor("ids"), file.metadata()
    assert ids.dtype == np.int32
    assert len(set(ids.tolist())) == len(ids) == 32_768
    assert 0 <= ids.min() < ids.max() < 151_665
    assert metadata["tokenizer_digest"].startswith("94e2a557")
