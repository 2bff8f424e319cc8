"""The tokenizer of a GGUF file, as its model's own.

transformers reads vocabulary and merges, with three mistakes: it takes for tokens what the file
marks as unused, put in to fill up the rows of the embedding; it adds an `<|endoftext|>` to files
that have none; and it leaves out the normalisation that a name such as `qwen2` stands for.
"""

from __future__ import annotations

import contextlib
import io
import json
from functools import lru_cache
from pathlib import Path

import gguf
from transformers import AutoTokenizer

_UNUSED = int(gguf.TokenType.UNUSED)
_NORMALISERS = {"qwen2": {"type": "NFC"}}
"""By the file's `tokenizer.ggml.pre`."""


def save_gguf_tokenizer(path: Path, directory: Path) -> None:
    """Write the tokenizer's files for transformers."""
    with without_progress():
        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(
            directory
        )
    reader = read_gguf(path)
    file = directory / "tokenizer.json"
    whole = json.loads(file.read_text("utf-8"))
    num_tokens = _num_used(reader)
    whole["model"]["vocab"] = {
        token: index for token, index in whole["model"]["vocab"].items() if index < num_tokens
    }
    added = [token for token in whole["added_tokens"] if token["id"] >= num_tokens]
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token not in added]
    _forget(directory / "tokenizer_config.json", {token["content"] for token in added})
    before = reader.get_field("tokenizer.ggml.pre")
    normaliser = None if before is None else _NORMALISERS.get(str(before.contents()))
    if normaliser is not None and whole["normalizer"] is None:
        whole["normalizer"] = normaliser
    file.write_text(json.dumps(whole, ensure_ascii=False), "utf-8")


def without_progress() -> contextlib.redirect_stderr[io.StringIO]:
    """Reading a GGUF file shows a progress bar that has no off switch."""
    return contextlib.redirect_stderr(io.StringIO())


@lru_cache(maxsize=1)
def read_gguf(path: Path) -> gguf.GGUFReader:
    """A file's reader, kept for the next call: reading a long vocabulary takes seconds."""
    return gguf.GGUFReader(path)


def _forget(config: Path, tokens: set[str]) -> None:
    """Take tokens out of the roles that a tokenizer's config gives them."""
    roles = json.loads(config.read_text("utf-8"))
    kept = {
        role: token
        for role, token in roles.items()
        if not (isinstance(token, str) and token in tokens)
    }
    config.write_text(json.dumps(kept, ensure_ascii=False, indent=2), "utf-8")


def _num_used(reader: gguf.GGUFReader) -> int:
    """Tokens without the unused ones at the end; others keep their ids."""
    types = reader.get_field("tokenizer.ggml.token_type")
    kinds = [] if types is None else list(types.contents())
    while kinds and kinds[-1] == _UNUSED:
        kinds.pop()
    tokens = reader.get_field("tokenizer.ggml.tokens")
    return len(kinds) if types is not None else 0 if tokens is None else len(tokens.data)
