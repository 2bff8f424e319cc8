"""Records side by side: batches of like lengths, so that little of what runs is padding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from training.distill.records import Record


@dataclass(frozen=True, slots=True)
class Batch:
    """B records with N answer tokens in all. Prompts are padded on the left and answers on the
    right, so that every answer follows its prompt.

    Attributes:
        prompts: int64[B, P], all but the last token of each prompt.
        feed: int64[B, A], the last prompt token and all answer tokens but the last.
        mask: int64[B, P + A], 1 where there is a token.
        where: bool[B, A], the N positions before answer tokens.
        top_ids: int32[N, K]; top_probs: float16[N, K].
    """

    prompts: Tensor
    feed: Tensor
    mask: Tensor
    where: Tensor
    top_ids: Tensor
    top_probs: Tensor


def collate(records: Sequence[Record], device: torch.device) -> Batch:
    """One batch on `device`."""
    count = len(records)
    before = max(record.prompt.numel() for record in records) - 1
    after = max(record.answer.numel() for record in records)
    tokens = torch.zeros(count, before + after, dtype=torch.long)
    mask = torch.zeros(count, before + after, dtype=torch.long)
    for row, record in enumerate(records):
        text = torch.cat([record.prompt, record.answer])[:-1]
        begin = before - (record.prompt.numel() - 1)
        tokens[row, begin : begin + text.numel()] = text
        mask[row, begin : begin + text.numel()] = 1
    parts = (
        tokens[:, :before],
        tokens[:, before:],
        mask,
        mask[:, before:].bool(),
        torch.cat([record.top_ids for record in records]),
        torch.cat([record.top_probs for record in records]),
    )
    return Batch(*(part.to(device) for part in parts))


class Answered(Protocol):
    """A prompt, int[P], and its answer, int[A]."""

    @property
    def prompt(self) -> Tensor: ...

    @property
    def answer(self) -> Tensor: ...


def plan_batches(records: Sequence[Answered], batch_tokens: int, seed: int) -> list[list[int]]:
    """Indices of records, batch by batch, each index once.

    Neighbours in length of answer, then of prompt, share a batch; which records are neighbours
    and the order of the batches are random.

    Args:
        batch_tokens: most answer tokens of a batch, padding included; one record may have more.
    """
    rng = random.Random(seed)
    shuffled = rng.sample(range(len(records)), len(records))
    order = sorted(shuffled, key=lambda index: _length_class(records[index]))
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, records[index].answer.numel())
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = records[index].answer.numel()
        batches[-1].append(index)
    rng.shuffle(batches)
    return batches


def _length_class(record: Answered) -> tuple[int, int]:
    return record.answer.numel() // 16, record.prompt.numel() // 16
