"""The target answers prompts, many sessions in a pass.

Greedy answers: what a speculator must foresee is what the target is surest of. Without prompts the
target makes some up: asked to go on from its own template's opening of a user turn, a chat model
writes a user's prompt (Magpie, Xu et al., 2024).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bus.protocol.errors import ModelError
from decoding.engine import Segment, Want
from decoding.sampling import SamplingParams
from decoding.verification import own_token
from engines.tokenizer import decode
from engines.torch.target import TargetModel
from training.distill.answers import Prompt
from training.distill.prompts import OWN_PROMPTS, encode, opening, until_end
from training.distill.records import Record

SESSIONS = 16
"""Prompts answered at once [ours]."""
_PREFILL = 128
_LONGEST_OWN_PROMPT = 64
_GREEDY = SamplingParams()


@dataclass(slots=True)
class _Writing:
    """A prompt that is being answered.

    Attributes:
        last: the token that has not run. written: the answer so far; probs: p₁ of each argmax.
    """

    prompt: Prompt
    cache: Any
    last: int
    written: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)

    def segment(self) -> Segment[Any]:
        """Its next token."""
        position = len(self.prompt.tokens) + len(self.written)
        choice_at = None if self.cache.sampling.greedy else position
        return Segment(self.cache, (self.last,), (Want(0, choice_at=choice_at),))


def answered(
    target: TargetModel,
    prompts: Iterable[Prompt],
    max_new_tokens: int,
    sampling: Callable[[int], SamplingParams] = lambda _: _GREEDY,
    num_sessions: int = SESSIONS,
) -> Iterator[Record]:
    """Answers to the prompts, each up to an end token or `max_new_tokens`, as they are finished.

    Args:
        sampling: of the prompt of that index.

    Yields:
        Records whose `top_ids` are the answer's own tokens alone, int32[A, 1].
    """
    waiting, live = deque(enumerate(prompts)), list[_Writing]()
    try:
        while waiting or live:
            while waiting and len(live) < num_sessions:
                index, prompt = waiting.popleft()
                live.append(_begin(target, prompt, sampling(index)))
            for writing in _advance(target, live, max_new_tokens):
                live.remove(writing)
                target.close(writing.cache)
                yield _record(writing)
    finally:
        for writing in live:
            target.close(writing.cache)


def _begin(target: TargetModel, prompt: Prompt, sampling: SamplingParams) -> _Writing:
    cache = target.open(sampling)
    *before, last = prompt.tokens
    for begin in range(0, len(before), _PREFILL):
        target.prefill(cache, before[begin : begin + _PREFILL])
    return _Writing(prompt, cache, last)


def _advance(target: TargetModel, live: Sequence[_Writing], max_new_tokens: int) -> list[_Writing]:
    """One pass of a token each; those that are finished."""
    finished = []
    rows = target.run([writing.segment() for writing in live])
    for writing, (row,) in zip(live, rows, strict=True):
        writing.last = own_token(row)
        writing.written.append(writing.last)
        writing.probs.append(row.p1_max)
        if writing.last in target.eos_tokens or len(writing.written) >= max_new_tokens:
            finished.append(writing)
    return finished


def _record(writing: _Writing) -> Record:
    answer = torch.tensor(writing.written, dtype=torch.int32)
    return Record(
        torch.tensor(writing.prompt.tokens, dtype=torch.int32),
        answer,
        answer[:, None],
        torch.tensor(writing.probs).half()[:, None],
        writing.prompt.prompt_set,
    )


def made_up_prompts(target: TargetModel, count: int, seed: int) -> list[Prompt]:
    """At most `count` prompts that the target makes up; the same seed gives the same.

    Raises:
        ModelError: it makes up only empty ones.
    """
    begin = Prompt(tuple(opening(target.tokenizer, target.eos_tokens)), OWN_PROMPTS)
    records = answered(
        target, [begin] * count, _LONGEST_OWN_PROMPT,
        lambda index: SamplingParams(temperature=1.0, seed=seed + index),
    )  # fmt: skip
    texts = sorted(
        decode(target.tokenizer, until_end(record.answer.tolist(), target.eos_tokens)).strip()
        for record in records
    )
    prompts = [Prompt(encode(target.tokenizer, text), OWN_PROMPTS) for text in texts if text]
    if not prompts:
        raise ModelError(
            f"{target.name} makes up only empty prompts; give some with --prompts FILE"
        )
    return prompts
