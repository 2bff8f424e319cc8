"""How many tokens a speculator foresees, beside what counting alone foresees.

*Accepted of n*: at every position of an answer the tokens of a chain of n that equal the target's
own, up to the first that does not; the mean over all positions with n tokens after them. Positions
are those after the token that the target has just put, as in decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from training.speculators.texts import Text, labels


class Foreseeing(Protocol):
    """A module that is judged."""

    @property
    def depth(self) -> int: ...

    def right(self, text: Text) -> Tensor: ...


class Quality(msgspec.Struct, frozen=True):
    """On held-out answers.

    Attributes:
        accepted: mean tokens of a chain of `depth`. right: share of positions at which each place
            of a chain is right, those before it given.
        positions: that count.
    """

    depth: int
    accepted: float
    right: tuple[float, ...]
    positions: int


def judged(rights: Sequence[Tensor], texts: Sequence[Text], depth: int) -> Quality:
    """Of bool[A, depth] for each text: whether the token at a place is foreseen."""
    whole = [
        right[: max(text.answer.numel() - depth + 1, 0)]
        for right, text in zip(rights, texts, strict=True)
    ]
    table = torch.cat(whole).float()
    if not len(table):
        return Quality(depth, 0.0, (0.0,) * depth, 0)
    accepted = float(table.cumprod(dim=1).sum(dim=1).mean())
    return Quality(depth, accepted, tuple(table.mean(dim=0).tolist()), len(table))


def quality(module: Foreseeing, texts: Sequence[Text]) -> Quality:
    """Of a module."""
    return judged([module.right(text) for text in texts], texts, module.depth)


def baselines(
    learnt: Sequence[Text], held_out: Sequence[Text], vocab_size: int, depth: int
) -> dict[str, Quality]:
    """What counting the answers learnt from foresees: `unigram` the most frequent token, `repeat`
    the last token again, `bigram` what most often followed the token before."""
    unigrams = torch.zeros(vocab_size)
    pairs: dict[int, dict[int, int]] = {}
    for text in learnt:
        unigrams += torch.bincount(text.answer, minlength=vocab_size)
        row = text.tokens[text.num_prompt - 1 :].tolist()
        for before, after in pairwise(row):
            counts = pairs.setdefault(before, {})
            counts[after] = counts.get(after, 0) + 1
    most = int(unigrams.argmax())
    follower = torch.full((vocab_size,), most)
    for before, counts in pairs.items():
        follower[before] = max(counts, key=lambda token: counts[token])
    found: dict[str, list[Tensor]] = {"unigram": [], "repeat": [], "bigram": []}
    for text in held_out:
        wanted = labels(text.answer, depth)
        last = text.tokens[text.num_prompt - 1 : -1]
        found["unigram"].append(wanted == most)
        found["repeat"].append(wanted == last[:, None])
        chain = [follower[last]]
        while len(chain) < depth:
            chain.append(follower[chain[-1]])
        found["bigram"].append(wanted == torch.stack(chain, dim=1))
    return {name: judged(rights, held_out, depth) for name, rights in found.items()}
