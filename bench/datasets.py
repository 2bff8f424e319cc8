"""Questions of public benchmarks from JSON Lines, as prompts.

The kind of a row is told by its fields:

    question, choices, answer      CommonsenseQA, MMLU    the question, a blank line, "A. …" lines
    prompt, entry_point, …         HumanEval              the stub in a Python block, to complete
    text, code, …                  MBPP                   the text, which asks for a function
    question, answer               GSM8K                  the question
    instruction, …; prompt, …      conversation           the text itself
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bus.errors import ConfigurationError

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, slots=True)
class Question:
    """One row.

    Attributes:
        dataset: name of its file, without the ending. index: its row there, from 0.
        prompt: what a user would type.
    """

    dataset: str
    index: int
    prompt: str


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` rows of a file.

    Raises:
        ConfigurationError: it cannot be read, is empty, or a row is of no known kind.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    rows = [line for line in lines if line.strip()][:limit]
    if not rows:
        raise ConfigurationError(f"{path} holds no rows")
    return [
        Question(path.stem, index, _prompt(line, f"{path}, row {index + 1}"))
        for index, line in enumerate(rows)
    ]


def mixed(files: Sequence[Path], count: int) -> list[Question]:
    """`count` questions in all, the files in turns."""
    columns = [read_questions(path, count) for path in files]
    turns = [
        column[at]
        for at in range(max(map(len, columns), default=0))
        for column in columns
        if at < len(column)
    ]
    return turns[:count]


def _prompt(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ConfigurationError(f"{where}: expected an object, got {type(row).__name__}")
    prompt = _by_kind(row)
    if prompt is None or not prompt.strip():
        raise ConfigurationError(
            f"{where}: of no known kind; expected a field prompt, question, instruction or text, "
            f"got {', '.join(row) or 'nothing'}"
        )
    return prompt


def _by_kind(row: Mapping[str, Any]) -> str | None:
    question, choices = row.get("question"), row.get("choices")
    if isinstance(question, str) and isinstance(choices, list):
        options = zip(LETTERS, map(str, choices), strict=False)
        return question + "\n\n" + "\n".join(f"{letter}. {text}" for letter, text in options)
    prompt = row.get("prompt")
    if isinstance(prompt, str) and "entry_point" in row:
        return f"Complete this Python function:\n\n```python\n{prompt.rstrip()}\n```"
    for name in ("prompt", "question", "instruction", "text"):
        if isinstance(row.get(name), str):
            return str(row[name])
    return None
