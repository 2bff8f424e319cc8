"""The texts of a training on disk: answers, and hidden states beside them, shard by shard.

    answers-00000.safetensors   what the target wrote (`training.distill.records`)
    medusa-00000.safetensors    `features`, float16: those of the shard's texts, one after the other
    eagle3-00000.safetensors    the same of the other kind

A shard that is there is complete, so a run that was cut off goes on with the next. Answers do not
depend on the kind of speculator: both trainings of a target share them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from bus.protocol.errors import ConfigurationError
from engines.torch.target import TargetModel
from training.distill.answers import Prompt
from training.distill.prompts import read_prompts
from training.distill.records import (
    Record,
    load_shard,
    load_shards,
    save_atomically,
    save_shard,
    shard_path,
)
from training.runs import check_same_settings
from training.speculators.answers import answered, made_up_prompts
from training.speculators.texts import Text

ANSWERS = "answers"
GROUP = 64
"""Prompts of a shard [ours]."""
_LONGEST_PROMPT = 400
HELD_OUT_EVERY, MOST_HELD_OUT = 10, 60

Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """Which texts there are.

    Attributes:
        prompts: files; none: the target makes up its own.
        num_tokens: of answers, at least, where the prompts suffice. max_new_tokens: of an answer.
    """

    directory: Path
    prompts: tuple[Path, ...] = ()
    num_tokens: int = 100_000
    max_new_tokens: int = 128
    seed: int = 0


def check_identity(path: Path, wanted: dict[str, Any], option: str) -> None:
    """Write what the runs on a directory have in common, or compare it with what is there.

    Raises:
        ConfigurationError: the directory was begun with other settings; the text names `option`.
    """
    if not path.is_file():
        path.write_bytes(msgspec.json.encode(wanted))
        return
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{path} is damaged ({error}); use a new {option}") from None
    check_same_settings(found, wanted, path.parent, option)


def collect_answers(settings: CorpusSettings, target: TargetModel, tick: Tick) -> None:
    """Have prompts answered until there are tokens enough; `tick` gets the tokens of each shard.

    Raises:
        ConfigurationError: a file of prompts cannot be used.
        ModelError: the target makes up no prompts.
    """
    settings.directory.mkdir(parents=True, exist_ok=True)
    asked = {
        "target": target.name,
        "dtype": str(target.dtype),
        "prompts": [str(path) for path in settings.prompts],
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
    }
    check_identity(settings.directory / "answers.json", asked, "--answers")
    groups, done, index = _groups(settings, target), 0, 0
    while done < settings.num_tokens and (group := next(groups, None)):
        path = shard_path(settings.directory, ANSWERS, index)
        if path.is_file():
            records = load_shard(path)
        else:
            records = list(answered(target, group, settings.max_new_tokens))
            save_shard(path, records)
        num_tokens = sum(record.answer.numel() for record in records)
        done, index = done + num_tokens, index + 1
        tick(num_tokens)


def _groups(settings: CorpusSettings, target: TargetModel) -> Iterator[list[Prompt]]:
    """Prompts of each shard, in an order fixed by the seed."""
    if not settings.prompts:
        seed = settings.seed * 1_000_003
        while True:
            yield made_up_prompts(target, GROUP, seed)
            seed += GROUP
    longest = min(_LONGEST_PROMPT, target.context_length - settings.max_new_tokens)
    prompts = [p for path in settings.prompts for p in read_prompts(path, target, longest)]
    random.Random(settings.seed).shuffle(prompts)
    rest = iter(prompts)
    while group := list(islice(rest, GROUP)):
        yield group


def collect_features(directory: Path, kind: str, target: TargetModel, tick: Tick) -> None:
    """Run the target over every text; `tick` gets the tokens of each shard's answers."""
    index = 0
    while (answers := shard_path(directory, ANSWERS, index)).is_file():
        path, records = shard_path(directory, kind, index), load_shard(answers)
        if not path.is_file():
            features = torch.cat([_features(kind, target, record) for record in _usable(records)])
            save_atomically(path, {"features": features.half()}, {})
        tick(sum(record.answer.numel() for record in records))
        index += 1


def _usable(records: Sequence[Record]) -> list[Record]:
    """Those whose first token has a hidden state before it."""
    return [record for record in records if record.prompt.numel() > 1]


def _features(kind: str, target: TargetModel, record: Record) -> Tensor:
    """As of a `Text`."""
    features = target.features((record.prompt.tolist() + record.answer.tolist())[:-2])
    if kind == "medusa":
        return features.last[record.prompt.numel() - 2 :]
    streams = features.low_mid_high
    epsilon = float(target.causal.own[0].config.rms_norm_eps)
    return F.rms_norm(streams, streams.shape[-1:], eps=epsilon)


def load_texts(directory: Path, kind: str) -> tuple[list[Text], list[Text]]:
    """Texts to learn from, and those held out: every tenth, at most 60. Hidden states stay on disk
    until they are read.

    Raises:
        ConfigurationError: a shard is missing or damaged, or there are too few texts.
    """
    texts, index = list[Text](), 0
    while (answers := shard_path(directory, ANSWERS, index)).is_file():
        records = _usable(load_shard(answers))
        features = load_file(shard_path(directory, kind, index))["features"]
        lengths = [_num_features(kind, record) for record in records]
        for record, part in zip(records, features.split_with_sizes(lengths), strict=True):
            tokens = torch.cat([record.prompt, record.answer]).long()
            texts.append(Text(tokens, record.prompt.numel(), part))
        index += 1
    held_out = texts[::HELD_OUT_EVERY][:MOST_HELD_OUT]
    held = {id(text) for text in held_out}
    learnt = [text for text in texts if id(text) not in held]
    if not learnt:
        raise ConfigurationError(
            f"{directory} holds {len(texts)} answers; at least two are needed, one to learn from "
            "and one to judge by"
        )
    return learnt, held_out


def _num_features(kind: str, record: Record) -> int:
    before = 0 if kind == "medusa" else record.prompt.numel() - 2
    return before + record.answer.numel()


def all_answers(directory: Path) -> list[Record]:
    """Of all shards."""
    return load_shards(directory, ANSWERS)
