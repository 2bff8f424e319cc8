"""A chain of models in which one's text is the next one's drafts (PipeSpec, arXiv 2505.01572).

An *outer* session, which the target verifies, takes its drafts from the text of an *inner* one,
which a smaller model verifies and writes. This module keeps what the outer session has read of its
own text, and answers its `Draft` effects:

    the inner text reaches beyond the position asked for     those tokens are the drafts
    it has another token before it, or does not reach it     the inner session begins again from
                                                             the outer text, then
    neither                                                  wait for the inner text to grow

So a mismatch at one stage is one at all stages before it: the inner session that begins again
drops, with its windows, what its own drafter had written. Nothing here decides a token: inner text
is a proposal.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from decoding.edge_events import Draft

Tokens = tuple[int, ...]


class Asked(Struct, frozen=True):
    """A `Draft` that waits for an answer: up to `count` tokens from absolute position `start`."""

    job: int
    start: int
    count: int


class Answer(Struct, frozen=True):
    """Drafts for `asked`, at least one."""

    asked: Asked
    tokens: Tokens


class Cascade(Struct, frozen=True):
    """The outer session's drafter, as its machine sees it.

    Attributes:
        text: what it has read: of prompt, committed text and drafts.
        asked: what it is asked for, if anything.
    """

    text: Tokens = ()
    asked: Asked | None = None

    def cropped(self, length: int) -> Cascade:
        """Without what lies from absolute position `length` on, and what was asked for after it."""
        asked = self.asked if length >= len(self.text) else None
        return Cascade(self.text[:length], asked)

    def ask(self, draft: Draft) -> Cascade:
        """With what the draft's feed adds, and the draft to be answered instead of an older one."""
        text = self.text + draft.feed
        return replace(self, text=text, asked=Asked(draft.job, len(text), draft.count))

    def dropped(self) -> Cascade:
        """Nobody waits for an answer any more."""
        return replace(self, asked=None)

    def begins_again(self, inner: Tokens) -> bool:
        """Whether the inner session must begin again, from `text`.

        Args:
            inner: its text, prompt included.
        """
        return inner[: len(self.text)] != self.text

    def answer(self, inner: Tokens, eos: frozenset[int]) -> tuple[Cascade, Answer | None]:
        """What the inner text has for the draft that waits, no further than a token of `eos`.

        The last token counts as drafted and not as read, as with a model.
        """
        asked = self.asked
        if asked is None or self.begins_again(inner):
            return self, None
        tokens = inner[asked.start : asked.start + asked.count]
        ends = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
        tokens = tokens[:ends]
        if not tokens:
            return self, None
        return Cascade(self.text + tokens[:-1]), Answer(asked, tokens)
