"""From the pieces of answers to the objects of OpenAI's API, whole or as a stream of chunks.

`Shape` is what chat completions and completions do differently; everything else is here.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from bus.store import End, TokensEntry, WorkerRecord
from gateway.answers import Answers
from gateway.errors import ApiError, error_object
from gateway.schemas import GenerationBody
from gateway.sse import DONE, KEEP_ALIVE, event

__all__ = ["Choice", "Reply", "Shape"]

Choice = dict[str, Any]

_IDLE_S = 15.0
"""After so long without a piece a stream sends a comment."""


class Shape(Protocol):
    """How a way to generate writes its choices."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    returns_tokens: bool
    """False: only the prompt is returned, and no token of an answer."""

    def opening(self, index: int) -> Choice | None:
        """The chunk before the first piece."""

    def piece(self, index: int, entry: TokensEntry) -> Choice | None:
        """A chunk; None where it would be empty."""

    def ending(self, index: int, reason: str) -> Choice:
        """The last chunk."""

    def whole(self, index: int, chunks: list[Choice], reason: str) -> Choice:
        """The choice, of its chunks."""


class Reply:
    """The answer to one HTTP request."""

    def __init__(
        self, shape: Shape, answers: Answers, body: GenerationBody, target: WorkerRecord
    ) -> None:
        self._shape = shape
        self._answers = answers
        self._num_choices = body.n or 1
        self._ends: dict[int, End] = {}
        self._num_tokens = 0
        options = body.stream_options
        self._with_usage = bool(options and options.include_usage)
        self._usage_so_far = bool(options and options.continuous_usage_stats)
        self._head = {
            "id": shape.id_prefix + answers.requests[0].id,
            "created": int(time.time()),
            "model": target.model,
            "system_fingerprint": target.probe_digest or None,
        }

    async def whole(self) -> dict[str, Any]:
        """The object, once every choice has ended. Raises ApiError."""
        chunks: dict[int, list[Choice]] = {
            index: [] for index in range(len(self._answers.requests))
        }
        async for piece in self._answers.pieces(_IDLE_S):
            if piece is None:
                continue
            if piece.end is not None:
                self._ends[piece.index] = piece.end
            elif piece.tokens is not None:
                chunk = self._shape.piece(piece.index, piece.tokens)
                chunks[piece.index] += [] if chunk is None else [chunk]
        choices = [
            self._shape.whole(index, found, self._reason(self._ends[index]))
            for index, found in chunks.items()
        ]
        return {
            **self._head,
            "object": self._shape.whole_object,
            "choices": choices,
            "usage": self._usage(),
            "e2sci": self._own(),
        }

    async def events(self) -> AsyncGenerator[bytes]:
        """The stream, which ends with [DONE], after an error too."""
        try:
            async for data in self._chunks():
                yield data
        except ApiError as error:
            yield event(error_object(error))
        yield DONE

    async def _chunks(self) -> AsyncGenerator[bytes]:
        shape = self._shape
        for index in range(len(self._answers.requests)):
            if (choice := shape.opening(index)) is not None:
                yield self._chunk(choice)
        async for piece in self._answers.pieces(_IDLE_S):
            if piece is None:
                yield KEEP_ALIVE
            elif piece.tokens is not None:
                self._num_tokens += len(piece.tokens.tokens)
                if (choice := shape.piece(piece.index, piece.tokens)) is not None:
                    yield self._chunk(choice)
            elif piece.end is not None:
                self._ends[piece.index] = piece.end
                yield self._chunk(shape.ending(piece.index, self._reason(piece.end)))
        if self._with_usage:
            last = {"choices": [], "usage": self._usage(), "e2sci": self._own()}
            yield event({**self._head, "object": shape.chunk_object, **last})

    def _chunk(self, choice: Choice) -> bytes:
        chunk = {**self._head, "object": self._shape.chunk_object, "choices": [choice]}
        if self._usage_so_far:
            chunk["usage"] = _token_counts(0, self._num_tokens)
        elif self._with_usage:
            chunk["usage"] = None
        return event(chunk)

    def _reason(self, end: End) -> str:
        return end.finish_reason.value if self._shape.returns_tokens else "length"

    def _usage(self) -> dict[str, Any]:
        """Of all choices; a prompt counts once, however many answers it has."""
        ends = [self._ends[index] for index in sorted(self._ends)]
        prompts = sum(end.usage.prompt_tokens for end in ends[:: self._num_choices])
        tokens = sum(end.usage.completion_tokens for end in ends)
        drafted = sum(end.usage.drafted_tokens for end in ends)
        accepted = sum(end.usage.accepted_tokens for end in ends)
        counts = _token_counts(prompts, tokens if self._shape.returns_tokens else 0)
        return counts | {
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": max(0, drafted - accepted),
            }
        }

    def _own(self) -> dict[str, Any]:
        usages = [end.usage for end in self._ends.values()]
        return {
            "request_ids": self._answers.ids,
            "drafted": sum(usage.drafted_tokens for usage in usages),
            "accepted": sum(usage.accepted_tokens for usage in usages),
            "rollbacks": sum(usage.rollbacks for usage in usages),
            "lossless": all(usage.lossless for usage in usages),
        }


def _token_counts(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
