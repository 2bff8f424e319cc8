"""`e2sci rank` as a user runs it, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from engines.catalog.places import cache_root
from tests.engines.tiny import save_tiny


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(save_tiny(tmp_path / "tiny"))


def test_the_ranking_lies_where_drafts_look_for_it(model: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat sat on the mat\n")
    done = CliRunner().invoke(app, ["rank", model, "--corpus", str(texts), "--size", "40"])
    assert done.exit_code == 0, done.output
    assert (cache_root() / "rankings" / "tiny.safetensors").is_file()
    assert "40 of 290 tokens" in done.stdout


def test_json_has_the_figures(model: str, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out.safetensors"
    texts.write_text('{"text": "zzzz"}\n')
    args = ["rank", model, "--corpus", str(texts), "--out", str(out), "--json"]
    done = CliRunner().invoke(app, args)
    figures = json.loads(done.stdout)
    assert done.stderr == ""
    assert (figures["path"], figures["size"], figures["counted_tokens"]) == (str(out), 290, 4)
    assert (figures["distinct_tokens"], figures["covered"]) == (1, 1.0)
    assert out.is_file()


def test_a_missing_corpus_is_one_line(model: str) -> None:
    done = CliRunner().invoke(app, ["rank", model, "--corpus", "nowhere.txt"])
    assert done.exit_code == 1
    assert done.stderr == ("error: nowhere.txt: no such file; expected a .jsonl or .txt of texts\n")
