"""Texts of files, to count tokens in."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bus.protocol.errors import ConfigurationError
from engines.catalog.sources import ModelSource, find_source
from engines.tokenizer import num_real_tokens
from engines.torch.conversion import read_config, save_tokenizer
from engines.torch.converted import on_disk
from engines.torch.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_PIECE_CHARS = 65_536  # of a text file; a tokenizer takes one call for each piece


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is known of a model without its weights.

    Attributes:
        name: for people and file names.
        size: number of real tokens; rows of the model beyond are padding.
    """

    name: str
    tokenizer: Tokenizer
    size: int


def load_vocabulary(spec: str) -> Vocabulary:
    """The tokenizer of a model, which is not loaded.

    Raises:
        ModelError: no such model, or one that cannot be read.
    """
    source = on_disk(find_source(spec))
    rows: int = read_config(source).get_text_config().vocab_size
    if source.gguf is None:
        tokenizer = load_tokenizer(source)
    else:
        with tempfile.TemporaryDirectory() as directory:
            save_tokenizer(source, Path(directory))
            tokenizer = load_tokenizer(ModelSource(source.name, directory, is_local=True))
    return Vocabulary(source.name, tokenizer, num_real_tokens(tokenizer, rows))


def read_corpus(path: Path) -> Iterator[tuple[str, int]]:
    """The texts of a file, each with the size in bytes of what it was read from.

    Args:
        path: `.jsonl`: an object a line, whose strings, also those in lists and objects within,
            are one text; fields `id` and `…_id` are left out. Any other name: plain text, read
            in pieces that end with a line. Line ends are those of models' answers, \\n.

    Raises:
        ConfigurationError: it cannot be read, or is not of that format.
    """
    try:
        with path.open("rb") as file:
            lines = enumerate(file, 1)
            yield from _rows(path, lines) if path.suffix == ".jsonl" else _pieces(path, lines)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error


def _rows(path: Path, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[str, int]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(_decoded(path, number, line))
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigurationError(f"{path}, line {number}: expected a JSON object of texts")
        yield "\n".join(_strings(row)).replace("\r\n", "\n"), len(line)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict):
        for name, part in value.items():
            if name.lower() != "id" and not name.endswith("_id"):
                yield from _strings(part)


def _pieces(path: Path, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[str, int]]:
    piece: list[str] = []
    num_chars = num_bytes = 0
    for number, line in lines:
        piece.append(_decoded(path, number, line))
        num_chars, num_bytes = num_chars + len(piece[-1]), num_bytes + len(line)
        if num_chars >= _PIECE_CHARS:
            yield "".join(piece), num_bytes
            piece, num_chars, num_bytes = [], 0, 0
    if piece:
        yield "".join(piece), num_bytes


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise ConfigurationError(
            f"{path}, line {number} is not UTF-8; encode the text as UTF-8"
        ) from None
