"""The target answers prompts, many at a time, and what it thought at each token is kept.

Greedy answers, because what a draft must foresee most is what the target is surest of; and a
corpus's texts read by the target, without generating. Both give the same records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from engines.torch.loading import LoadedModel
from training.distill.records import Record

NUM_TOP = 48
"""K: probabilities kept of each position, as many as a draft sends."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a prompt, ready for the target to answer, and the set it is from."""

    tokens: tuple[int, ...]
    prompt_set: str


@dataclass(slots=True)
class _Group:
    """Prompts being answered together; finished ones leave.

    Attributes:
        cache: the target's keys and values of the `live` prompts, padded on the left.
        mask: int64[n, T] over all positions so far. feed: int64[n, t], what to run next.
        live: indices of the prompts still being answered.
    """

    cache: Any
    mask: Tensor
    feed: Tensor
    live: Tensor
    answers: list[list[int]] = field(default_factory=list)
    top_ids: list[list[Tensor]] = field(default_factory=list)
    top_probs: list[list[Tensor]] = field(default_factory=list)

    def keep(self, going_on: Tensor) -> None:
        """Drop finished prompts. `going_on`: bool[n]."""
        index = going_on.nonzero()[:, 0]
        self.cache.batch_select_indices(index)
        self.live, self.mask = self.live[index], self.mask[index]


@torch.inference_mode()
def answer(
    target: LoadedModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    stop: Callable[[], bool] = lambda: False,
) -> list[Record]:
    """Greedy answers to all prompts at once, each up to an end token or `max_new_tokens`; once
    `stop()` is true, as far as they are (a token at least)."""
    group = _open_group(target, prompts)
    ends = torch.tensor(sorted(target.eos_tokens), device=target.device)
    positions = (group.mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(max_new_tokens):
        logits = target.model(
            group.feed,
            attention_mask=group.mask,
            position_ids=positions,
            cache=group.cache,
            logits_to_keep=1,
        ).logits[:, -1, : target.vocab_size]
        ids, probs = top_probabilities(logits)
        _append(group, ids, probs)
        going_on = ~torch.isin(ids[:, 0], ends)
        if not going_on.any() or stop():
            break
        positions = positions[going_on, -1:] + 1
        if not going_on.all():
            group.keep(going_on)
        group.feed = ids[going_on, :1]
        group.mask = torch.nn.functional.pad(group.mask, (0, 1), value=1)
    return [_record(group, index, prompt) for index, prompt in enumerate(prompts)]


@torch.inference_mode()
def read(target: LoadedModel, text: Sequence[int], prompt_set: str) -> Record:
    """What the target thinks of a text of two tokens or more: a record without generating."""
    tokens = torch.tensor(text, device=target.device)
    logits = target.model(tokens[None, :-1], use_cache=False).logits[0, :, : target.vocab_size]
    ids, probs = top_probabilities(logits)
    tokens = tokens.int().cpu()
    return Record(tokens[:1], tokens[1:], ids.int().cpu(), probs.half().cpu(), prompt_set)


def top_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the most probable tokens, falling: int64[n, K], float32[n, K]."""
    wide = logits.float()
    top, ids = wide.topk(min(NUM_TOP, wide.shape[-1]))
    return ids, (top - wide.logsumexp(-1, keepdim=True)).exp()


def _open_group(target: LoadedModel, prompts: Sequence[Prompt]) -> _Group:
    count, width = len(prompts), max(len(prompt.tokens) for prompt in prompts)
    feed = torch.zeros(count, width, dtype=torch.long)
    mask = torch.zeros(count, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        feed[row, width - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        mask[row, width - len(prompt.tokens) :] = 1
    device = target.device
    group = _Group(DynamicCache(), mask.to(device), feed.to(device), torch.arange(count))
    for kept in (group.answers, group.top_ids, group.top_probs):
        kept.extend([] for _ in prompts)
    return group


def _append(group: _Group, ids: Tensor, probs: Tensor) -> None:
    ids_here, probs_here = ids.int().cpu(), probs.half().cpu()
    for row, index in enumerate(group.live.tolist()):
        group.answers[index].append(int(ids_here[row, 0]))
        group.top_ids[index].append(ids_here[row])
        group.top_probs[index].append(probs_here[row])


def _record(group: _Group, index: int, prompt: Prompt) -> Record:
    return Record(
        torch.tensor(prompt.tokens, dtype=torch.int32),
        torch.tensor(group.answers[index], dtype=torch.int32),
        torch.stack(group.top_ids[index]),
        torch.stack(group.top_probs[index]),
        prompt.prompt_set,
    )
