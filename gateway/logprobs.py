"""Log-probabilities as OpenAI's two formats have them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from bus.store import Alternative, ScoredToken

__all__ = ["chat_logprobs", "legacy_logprobs", "prompt_lengths", "prompt_text"]


def chat_logprobs(scores: Sequence[ScoredToken]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion: one object a token."""
    content = [
        {**_alternative(score.chosen), "top_logprobs": [_alternative(one) for one in score.top]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _alternative(one: Alternative) -> dict[str, Any]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.data)}


def legacy_logprobs(
    scores: Sequence[ScoredToken], lengths: Sequence[int], offset: int, begins: bool = False
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion: four lists with an item a token.

    Args:
        lengths: characters that each token brings.
        offset: where the first one's begin within the choice's text.
        begins: the first token is a prompt's first: nothing precedes it, so it has null.
    """
    offsets = []
    for length in lengths:
        offsets.append(offset)
        offset += length
    probabilities: list[float | None] = [score.chosen.logprob for score in scores]
    tops: list[dict[str, float] | None] = [_top(score) for score in scores]
    if begins and scores:
        probabilities[0] = tops[0] = None
    return {
        "tokens": [score.chosen.text for score in scores],
        "token_logprobs": probabilities,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _top(score: ScoredToken) -> dict[str, float]:
    """By text, the token itself included; of tokens with the same text the most probable counts."""
    found: dict[str, float] = {}
    for one in (*score.top, score.chosen):
        found.setdefault(one.text, one.logprob)
    return found


def prompt_text(scores: Sequence[ScoredToken]) -> str:
    """The text of a prompt's tokens."""
    return b"".join(score.chosen.data for score in scores).decode("utf-8", "replace")


def prompt_lengths(scores: Sequence[ScoredToken]) -> list[int]:
    """Characters that each of a prompt's tokens brings; one that ends within a character leaves it
    to the token that completes it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [len(decoder.decode(score.chosen.data)) for score in scores]
