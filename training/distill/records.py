"""What the target answered and thought, on disk: the cache that several epochs read.

One shard is one safetensors file, written beside its final name and renamed: a shard that is
there is complete. Layout, for R records with T tokens and A answer tokens in all:

| tensor | |
|---|---|
| `tokens` | int32[T], prompt and answer of every record, one after the other |
| `prompt_lengths`, `answer_lengths` | int32[R] |
| `top_ids` | int32[A, K], the target's most probable tokens before each answer token, falling |
| `top_probs` | float16[A, K], their temperature-1 probabilities |

The metadata hold `sets`, a JSON list with the name of the prompt set of each record. A text of a
corpus is a record as well: its first token is the prompt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bus.protocol.errors import ConfigurationError

_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with its answer.

    Attributes:
        prompt: int32[P], P ≥ 1. answer: int32[A], A ≥ 1.
        top_ids: int32[A, K]; top_probs: float16[A, K]: the target's, before each answer token.
        prompt_set: name of the set the prompt is from.
    """

    prompt: Tensor
    answer: Tensor
    top_ids: Tensor
    top_probs: Tensor
    prompt_set: str


def save_shard(path: Path, records: Sequence[Record]) -> None:
    """Write a shard atomically."""
    tensors = {
        "tokens": torch.cat([part for r in records for part in (r.prompt, r.answer)]).int(),
        "prompt_lengths": torch.tensor([r.prompt.numel() for r in records], dtype=torch.int32),
        "answer_lengths": torch.tensor([r.answer.numel() for r in records], dtype=torch.int32),
        "top_ids": torch.cat([r.top_ids for r in records]).int(),
        "top_probs": torch.cat([r.top_probs for r in records]).half(),
    }
    save_atomically(path, tensors, {"sets": json.dumps([r.prompt_set for r in records])})


def save_atomically(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], durable: bool = True
) -> None:
    """Write a safetensors file that is complete once it has its name: even after a power cut if
    `durable`, else after the process was killed."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, scratch, metadata)
        scratch.chmod(0o644)  # safetensors makes it the owner's alone
        if durable:
            with scratch.open("rb+") as file:
                os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def load_shard(path: Path) -> list[Record]:
    """Records of one shard.

    Raises:
        ConfigurationError: no such file, or not a shard.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            sets = json.loads((file.metadata() or {})["sets"])
        return _split(tensors, sets)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"{path} is no shard of answers ({error}); remove it and run again"
        ) from error


def load_shards(directory: Path, prefix: str) -> list[Record]:
    """Records of every shard `PREFIX-….safetensors` in a directory, in the order of their names."""
    paths = sorted(directory.glob(f"{prefix}-*{_SUFFIX}"))
    return [record for path in paths for record in load_shard(path)]


def shard_path(directory: Path, prefix: str, index: int) -> Path:
    """Where shard `index` is kept."""
    return directory / f"{prefix}-{index:05d}{_SUFFIX}"


def _split(tensors: dict[str, Tensor], sets: list[str]) -> list[Record]:
    prompts, answers = tensors["prompt_lengths"].tolist(), tensors["answer_lengths"].tolist()
    lengths = [n for pair in zip(prompts, answers, strict=True) for n in pair]
    texts = torch.split(tensors["tokens"], lengths)
    top_ids = torch.split(tensors["top_ids"], answers)
    top_probs = torch.split(tensors["top_probs"], answers)
    parts = zip(texts[::2], texts[1::2], top_ids, top_probs, sets, strict=True)
    return [Record(*part) for part in parts]
