"""What the target is asked: prompts and texts from files, or prompts it makes up itself.

A chat model asked to go on from its own template's opening of a user turn writes a user's prompt
(Magpie, Xu et al., 2024): text of the kind it was trained on, without any data set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch

from bus.protocol.errors import ConfigurationError, ModelError
from engines.chat import encode_prompt
from engines.tokenizer import decode
from engines.torch.loading import LoadedModel
from training.distill.answers import Prompt

OWN_PROMPTS = "own"
"""Name of the set of prompts that the target made up."""
_LONGEST_OWN_PROMPT = 64
_PLACE_OF_PROMPT = "\u2402\u2403"


class Tokenizing(Protocol):
    """A model with its tokenizer, of transformers or of an engine."""

    @property
    def tokenizer(self) -> Any: ...


def read_prompts(path: Path, target: Tokenizing, longest: int) -> list[Prompt]:
    """Prompts of a file, encoded as the edge worker would; longer ones than `longest` tokens are
    left out.

    Args:
        path: `.jsonl` with a field `prompt`, and `set` where one file holds several sets; or
            `.txt` with a prompt a line.

    Raises:
        ConfigurationError: it cannot be read, or holds no prompt.
    """
    prompts = []
    for number, row in enumerate(_rows(path, "prompt"), 1):
        text, prompt_set = row["prompt"], row.get("set", path.stem)
        if not isinstance(text, str) or not isinstance(prompt_set, str) or not text.strip():
            raise ConfigurationError(f"{path}, row {number}: 'prompt' and 'set' must be text")
        tokens = encode(target.tokenizer, text)
        if len(tokens) <= longest:
            prompts.append(Prompt(tokens, prompt_set))
    if not prompts:
        raise ConfigurationError(f"{path} holds no prompt of at most {longest} tokens")
    return prompts


def read_texts(path: Path, target: LoadedModel, length: int) -> list[tuple[int, ...]]:
    """Texts of a corpus (`.jsonl` with a field `text`, or `.txt` with a text a line), cut into
    pieces of at most `length` and at least 2 tokens.

    Raises:
        ConfigurationError: it cannot be read, or holds no text.
    """
    pieces: list[tuple[int, ...]] = []
    for row in _rows(path, "text"):
        tokens = target.tokenizer.encode(str(row["text"]), add_special_tokens=False)
        cuts = (tuple(tokens[i : i + length]) for i in range(0, len(tokens), length))
        pieces.extend(piece for piece in cuts if len(piece) > 1)
    if not pieces:
        raise ConfigurationError(f"{path} holds no text of two tokens or more")
    return pieces


@torch.inference_mode()
def own_prompts(target: LoadedModel, seed: int, count: int, seconds: float) -> list[Prompt]:
    """At most `count` prompts that the target makes up; the same seed gives the same, unless they
    are cut short after `seconds`.

    Raises:
        ModelError: it makes up only empty ones.
    """
    begin = opening(target.tokenizer, target.eos_tokens)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written: Any = target.model.generate(
            torch.tensor([begin], device=target.device),
            attention_mask=torch.ones(1, len(begin), device=target.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            num_return_sequences=count,
            max_new_tokens=_LONGEST_OWN_PROMPT,
            max_time=seconds,
            eos_token_id=sorted(target.eos_tokens),
            pad_token_id=min(target.eos_tokens),
        )
    ends = target.eos_tokens
    tails = [until_end(tokens, ends) for tokens in written[:, len(begin) :].tolist()]
    texts = [decode(target.tokenizer, tokens).strip() for tokens in tails]
    prompts = [Prompt(encode(target.tokenizer, text), OWN_PROMPTS) for text in texts if text]
    if not prompts:
        raise ModelError(
            f"{target.name} makes up only empty prompts; give some with --prompts FILE"
        )
    return prompts


def opening(tokenizer: Any, eos_tokens: frozenset[int]) -> list[int]:
    """The template's text before a user's prompt; without a template, how any text begins."""
    if not tokenizer.chat_template:
        begin = tokenizer.bos_token_id
        return [min(eos_tokens) if begin is None else int(begin)]
    message = [{"role": "user", "content": _PLACE_OF_PROMPT}]
    text: Any = tokenizer.apply_chat_template(message, tokenize=False)
    ids: list[int] = tokenizer.encode(text.partition(_PLACE_OF_PROMPT)[0], add_special_tokens=False)
    return ids


def until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """The tokens before the first of `ends`."""
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """A prompt as the edge worker encodes it."""
    return encode_prompt(tokenizer, text, raw=not tokenizer.chat_template)


def _rows(path: Path, field: str) -> list[dict[str, Any]]:
    """Rows of a file as dictionaries that have `field`."""
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}; expected UTF-8 text") from error
    if path.suffix != ".jsonl":
        return [{field: line} for line in lines]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or field not in row:
            raise ConfigurationError(f"{path}, line {number} has no field {field!r}")
        rows.append(row)
    return rows
