"""Log-probabilities as users read them: token ids become the bytes that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from bus.store.entries import Alternative, ScoredToken
from decoding.edge_state import SessionSpec
from decoding.token_scores import TokenScore
from engines.tokenizer import token_bytes

_MAX_KNOWN = 4096


def scorer_of(spec: SessionSpec, tokenizer: Any) -> Scorer | None:
    """Of a session's answer; None where it wants no log-probabilities."""
    if spec.logprobs is None:
        return None
    return Scorer(tokenizer, spec.prompt if spec.prompt_logprobs else ())


class Scorer:
    """Turns an answer's scores into entries of its result.

    Args:
        tokenizer: the answer's. prompt: its prompt's token ids, where scores of them are wanted.
    """

    def __init__(self, tokenizer: Any, prompt: tuple[int, ...] = ()) -> None:
        self._prompt = prompt
        self._bytes_of = lru_cache(_MAX_KNOWN)(lambda token: token_bytes(tokenizer, token))

    def scored(
        self, tokens: Sequence[int], scores: Sequence[TokenScore]
    ) -> tuple[ScoredToken, ...]:
        """Of each token; none where there are no scores."""
        return tuple(
            ScoredToken(
                self._alternative(token, score.logprob),
                tuple(self._alternative(other, log) for other, log in score.others),
            )
            for token, score in zip(tokens, scores, strict=bool(scores))
        )

    def prompt(self, scores: Sequence[TokenScore]) -> tuple[ScoredToken, ...]:
        """Of the prompt, whose first token follows nothing and has no probability."""
        if not self._prompt:
            return ()
        first = ScoredToken(self._alternative(self._prompt[0], 0.0))
        return (first, *self.scored(self._prompt[1:], scores))

    def _alternative(self, token: int, logprob: float) -> Alternative:
        return Alternative(token, logprob, self._bytes_of(token))
