"""The texts that int8 and float32 read: the int8 target's own greedy answers.

Answers are kept in a file as they are made; a run that was cut off goes on there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from bench.lines import append_rows, read_all
from engines.catalog.sources import find_source
from engines.chat import encode_prompt
from engines.torch.cache import KVCache
from engines.torch.converted import content_key, on_disk
from engines.torch.linears import integer
from engines.torch.loading import LoadedModel, load_model
from engines.torch.network import CausalNetwork

LONGEST = 100
"""Tokens of an answer at most."""


class TargetAnswer(msgspec.Struct, frozen=True):
    """One answer of the int8 target.

    Attributes:
        model: digest of the target's weights.
        dataset, index: which prompt.
        prompt, answer: token ids; an end-of-answer token is part of the answer.
        ended: whether the target ended it; else it was cut.
    """

    model: str
    dataset: str
    index: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    ended: bool

    def serves(self, prompt: tuple[int, ...], limit: int) -> bool:
        """Whether it answers this prompt as far as `limit` tokens."""
        return self.prompt == prompt and (self.ended or len(self.answer) >= limit)

    def cut(self, limit: int) -> TargetAnswer:
        """Its first `limit` tokens."""
        if len(self.answer) <= limit:
            return self
        return msgspec.structs.replace(self, answer=self.answer[:limit], ended=False)


class Answerer:
    """A target in int8 that answers greedily."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Take over `loaded`, whose `model` is used up."""
        self._network = CausalNetwork(loaded.model, loaded.vocab_size, integer)
        self._tokenizer, self._eos = loaded.tokenizer, loaded.eos_tokens
        self._context_length = loaded.context_length

    def encode(self, prompt: str) -> tuple[int, ...] | None:
        """Its tokens; None where an answer does not fit into the context."""
        tokens = encode_prompt(self._tokenizer, prompt, raw=False)
        return tokens if len(tokens) + LONGEST <= self._context_length else None

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], limit: int) -> tuple[tuple[int, ...], bool]:
        """At most `limit` tokens, and whether the target ended the answer."""
        cache, feed, answer = KVCache(), list(prompt), list[int]()
        while len(answer) < limit:
            token = int(self._network.logits(torch.tensor(feed), cache, 1)[0].argmax())
            answer.append(token)
            if token in self._eos:
                return tuple(answer), True
            feed = [token]
        return tuple(answer), False


def read_answers(
    spec: str,
    prompts: Mapping[str, Sequence[str]],
    num_tokens: int,
    keep: Path | None,
    advance: Callable[[int], None],
) -> list[TargetAnswer]:
    """Answers of `num_tokens` tokens in all, spread evenly over the sets.

    A set whose prompts are all answered before its share is reached gives fewer.

    Args:
        spec: of the target.
        prompts: set → what is asked, in this order.
        keep: file of answers, read first and added to.
        advance: is passed the number of tokens of each answer.

    Raises:
        ModelError, ConfigurationError: the target cannot be loaded in int8.
    """
    answerer = Answerer(load_model(spec, "int8"))
    model = content_key(on_disk(find_source(spec)))
    rows = [] if keep is None else read_all(keep, TargetAnswer)
    kept = {(row.dataset, row.index): row for row in rows if row.model == model}
    answers = []
    for number, (dataset, asked) in enumerate(prompts.items()):
        left = num_tokens // len(prompts) + (number < num_tokens % len(prompts))
        for index, text in enumerate(asked):
            limit, prompt = min(LONGEST, left), answerer.encode(text)
            if limit == 0:
                break
            if prompt is None:
                continue
            row = kept.get((dataset, index))
            if row is None or not row.serves(prompt, limit):
                row = TargetAnswer(model, dataset, index, prompt, *answerer.answer(prompt, limit))
                if keep is not None:
                    append_rows(keep, [row])
            answers.append(row.cut(limit))
            left -= len(answers[-1].answer)
            advance(len(answers[-1].answer))
    return answers
