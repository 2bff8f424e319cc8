"""Questions of public benchmarks from JSON Lines, as prompts.

The kind of a row is told by its fields:

    kind        fields                         what is asked
    choice      question, choices, answer      CommonsenseQA, MMLU: the question and "A. …" lines
    completion  prompt, entry_point, test      HumanEval: the stub in a Python block, to complete
    number      question, answer "… #### n"    GSM8K: the question
    open        text; instruction; prompt      MBPP, conversation: the text itself

How an answer is asked for and marked is in `bench.tasks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from bus.protocol.errors import ConfigurationError

LETTERS = "ABCDEFGHIJ"
GOLD_NUMBER = "####"
"""GSM8K writes the number of its answers after this."""


class Kind(StrEnum):
    """What a row asks for."""

    CHOICE = "choice"
    COMPLETION = "completion"
    NUMBER = "number"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Question:
    """One row.

    Attributes:
        dataset: name of its file, without the ending. index: its row there, from 0.
        prompt: what a user would type.
        row: all its fields.
    """

    dataset: str
    index: int
    prompt: str
    kind: Kind = Kind.OPEN
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


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
        _question(path.stem, index, line, f"{path}, row {index + 1}")
        for index, line in enumerate(rows)
    ]


def mixed(files: Sequence[Path], count: int) -> list[Question]:
    """`count` questions in all, the files in turns."""
    return in_turns([read_questions(path, count) for path in files])[:count]


def in_turns(columns: Sequence[Sequence[Question]]) -> list[Question]:
    """The first of each column, then the second of each, and so on."""
    return [
        column[at]
        for at in range(max(map(len, columns), default=0))
        for column in columns
        if at < len(column)
    ]


def _question(dataset: str, index: int, line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ConfigurationError(f"{where}: expected an object, got {type(row).__name__}")
    kind, prompt = _kind_and_prompt(row)
    if not prompt.strip():
        raise ConfigurationError(
            f"{where}: of no known kind; expected a field prompt, question, instruction or text, "
            f"got {', '.join(row) or 'nothing'}"
        )
    return Question(dataset, index, prompt, kind, row)


def _kind_and_prompt(row: Mapping[str, Any]) -> tuple[Kind, str]:
    question, choices = row.get("question"), row.get("choices")
    if isinstance(question, str) and isinstance(choices, list):
        options = zip(LETTERS, map(str, choices), strict=False)
        lines = "\n".join(f"{letter}. {text}" for letter, text in options)
        return Kind.CHOICE, f"{question}\n\n{lines}"
    prompt = row.get("prompt")
    if isinstance(prompt, str) and "entry_point" in row:
        stub = f"Complete this Python function:\n\n```python\n{prompt.rstrip()}\n```"
        return Kind.COMPLETION, stub
    if isinstance(question, str) and GOLD_NUMBER in str(row.get("answer", "")):
        return Kind.NUMBER, question
    for name in ("prompt", "question", "instruction", "text"):
        if isinstance(row.get(name), str):
            return Kind.OPEN, str(row[name])
    return Kind.OPEN, ""
