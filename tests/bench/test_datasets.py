"""Rows of public benchmarks as prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.datasets import Kind, Question, mixed, read_questions
from bus.protocol.errors import ConfigurationError


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", "utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "prompt", "kind"),
    [
        ({"question": "How many?", "answer": "#### 3"}, "How many?", Kind.NUMBER),
        (
            {"question": "Which?", "choices": ["red", "blue"]},
            "Which?\n\nA. red\nB. blue",
            Kind.CHOICE,
        ),
        (
            {"prompt": "def f():\n", "entry_point": "f", "test": "…"},
            "Complete this Python function:\n\n```python\ndef f():\n```",
            Kind.COMPLETION,
        ),
        ({"text": "Write a function.", "code": "…"}, "Write a function.", Kind.OPEN),
        ({"instruction": "Name a bird.", "response": "Wren"}, "Name a bird.", Kind.OPEN),
        ({"question": "Why?", "answer": "Because."}, "Why?", Kind.OPEN),
        ({"prompt": "Hello"}, "Hello", Kind.OPEN),
    ],
)  # fmt: skip
def test_a_row_is_asked_as_a_user_would(tmp_path: Path, row: Any, prompt: str, kind: Kind) -> None:
    path = write(tmp_path / "set.jsonl", row)
    assert read_questions(path) == [Question("set", 0, prompt, kind)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"), ("{", "row 1 is no JSON"), ("[1]", "expected an object"),
        ('{"answer": "x"}', "no known kind; .* got answer"), ('{"prompt": ""}', "no known kind"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_said(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigurationError, match=message):
        read_questions(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.jsonl cannot be read"):
        read_questions(tmp_path / "none.jsonl")


def test_files_take_turns(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", *[{"prompt": f"a{i}"} for i in range(3)])
    b = write(tmp_path / "b.jsonl", {"prompt": "b0"})
    assert [q.prompt for q in mixed([a, b], 9)] == ["a0", "b0", "a1", "a2"]
    assert [q.prompt for q in mixed([a, b], 2)] == ["a0", "b0"]
