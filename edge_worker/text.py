"""From tokens to text, token by token: an answer with its stop strings, a step with its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decoding.steps import is_whole
from decoding.stopping import StopScanner
from engines.tokenizer import Detokenizer


class AnswerText:
    """The text of one answer as its tokens come.

    Attributes:
        num_tokens: tokens pushed so far; at a stop, the one that completed the stop string is
            the last (vLLM's convention for token ids).
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._scanner = StopScanner(stops)
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been completed."""
        return self._scanner.matched

    def push(self, tokens: Sequence[int]) -> str:
        """Text to show now. Pushes no further than the token that completes a stop string."""
        return "".join(self.push_each(tokens))

    def push_each(self, tokens: Sequence[int]) -> list[str]:
        """The same, token by token. Text is shown with the token that completes a character."""
        shown = []
        for token in tokens:
            shown.append(self._scanner.push(self._detokenizer.push(token)))
            self.num_tokens += 1
            if self.stopped:
                break
        return shown

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        return self._scanner.push(self._detokenizer.flush()) + self._scanner.flush()


class StepText:
    """One version of a step as its tokens come: what it reads, and whether it is whole.

    Where it ends depends on its tokens alone.
    """

    def __init__(self, tokenizer: Any, eos: frozenset[int], max_tokens: int) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._eos = eos
        self._max_tokens = max_tokens
        self._text = ""
        self.tokens: tuple[int, ...] = ()
        self.ended = False

    def push(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Take tokens up to the one that ends the step; returns those taken."""
        for count, token in enumerate(tokens):
            if self.ended:
                return tuple(tokens[:count])
            self._text += self._detokenizer.push(token)
            self.tokens += (token,)
            full = len(self.tokens) >= self._max_tokens
            self.ended = full or token in self._eos or is_whole(self._text)
        return tuple(tokens)

    def read(self) -> str:
        """The text, once it has ended."""
        self._text += self._detokenizer.flush()
        return self._text
