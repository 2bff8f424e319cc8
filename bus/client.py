"""A client of the service: submit prompts, read answers as they come, cancel.

    from bus.client import Client

    async with Client(redis_url="redis://127.0.0.1:6379/0") as client:
        request_id = await client.submit("Why is the sky blue?", max_new_tokens=64)
        async for chunk in client.stream(request_id):
            print(chunk.text, end="", flush=True)

        answer = await client.generate("Write a haiku about queues.", temperature=0.8, seed=7)
        print(answer.text, answer.finish_reason, answer.usage.tokens_per_s)

        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
        print((await client.chat(chat)).text)

It needs nothing but Redis and works from any machine that reaches it. Reading waits through short
outages of Redis. This module does not know workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from bus.protocol.chat import ChatMessage
from bus.protocol.errors import LocalError, RequestFailedError, RequestTimeoutError
from bus.protocol.requests import new_request
from bus.settings import BusSettings
from bus.store import Store
from bus.store.entries import End, FinishReason, ScoredToken, TokensEntry, Usage

__all__ = ["Answer", "Chunk", "Client"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer; the last one of a stream carries `end` and neither tokens nor text.

    Attributes:
        start: index of the first token within the answer.
        token_ids: the piece's tokens.
        accepted: for each token, whether it was drafted and accepted.
        text: what the piece adds to the text.
        lengths: characters of it that each token brought; empty where nobody said.
        end: how the answer ended: finish reason, error, usage.
        scores: of each token, the target's log-probabilities; empty where not asked for.
        prompt_scores: of the prompt's tokens, in the first piece, where asked for.
    """

    start: int
    token_ids: tuple[int, ...] = ()
    accepted: tuple[bool, ...] = ()
    text: str = ""
    lengths: tuple[int, ...] = ()
    end: End | None = None
    scores: tuple[ScoredToken, ...] = ()
    prompt_scores: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `error` is empty unless `finish_reason` is `error`; `scores` and
    `prompt_scores` are those of its chunks together."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    error: str = ""
    scores: tuple[ScoredToken, ...] = ()
    prompt_scores: tuple[ScoredToken, ...] = ()


class Client:
    """Talks to the service through Redis; an asynchronous context manager."""

    def __init__(
        self, *, redis_url: str | None = None, settings: BusSettings | None = None
    ) -> None:
        """A client of the Redis at `redis_url`, else of the one that `settings` name.

        Without either, environment and settings file decide (`bus.settings`).

        Raises:
            ConfigurationError: a setting is wrong.
        """
        if settings is None:
            settings = BusSettings.load(**({} if redis_url is None else {"redis_url": redis_url}))
        elif redis_url is not None:
            raise LocalError("give redis_url or settings, not both")
        self._settings = settings
        self._store: Store | None = None

    async def __aenter__(self) -> Self:
        """Connect. Raises StoreUnavailableError where Redis does not answer."""
        self._store = await Store.connect(self._settings)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        store, self._store = self._connected, None
        await store.close()

    async def submit(
        self,
        prompt: str = "",
        *,
        messages: Sequence[ChatMessage | Mapping[str, str]] | None = None,
        prompt_ids: Sequence[int] | None = None,
        method: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        coupling: str | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        raw: bool | None = None,
        client: str | None = None,
        ignore_eos: bool | None = None,
        logprobs: int | None = None,
        prompt_logprobs: bool | None = None,
        traceparent: str | None = None,
    ) -> str:
        """Queue a prompt, chat messages or token ids; returns the request id.

        One of the three must be given; None takes the default everywhere else.
        Meaning, range and default of each option: `bus.protocol.requests.GenerationRequest`. The
        seed is random where none is given.

        Raises:
            RequestError: an option is wrong; the text names all problems.
            QueueFullError: too many requests are waiting.
            StoreUnavailableError: Redis does not answer.
        """
        request = new_request(
            prompt,
            messages=messages,
            prompt_ids=None if prompt_ids is None else tuple(prompt_ids),
            method=method,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            coupling=coupling,
            seed=seed,
            stop=stop,
            raw=raw,
            client=client,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            traceparent=traceparent,
        )
        return await self._connected.queue.submit(request)

    async def stream(self, request_id: str, timeout_s: float | None = None) -> AsyncIterator[Chunk]:
        """The answer from its beginning, piece by piece as it comes; the last chunk has `end`.

        Works for any request id, also after the answer is complete, until the result expires.

        Raises:
            RequestTimeoutError: no end within `timeout_s` seconds; the request goes on.
            RequestFailedError: the request vanished from Redis. (An answer that ends with an
                error is no exception here: see `end`.)
            StoreUnavailableError: Redis was away for longer than 30 s.
        """
        position = 0
        async for entry in self._connected.results.read(request_id, timeout_s=timeout_s):
            if isinstance(entry, TokensEntry):
                yield Chunk(
                    entry.start, entry.tokens, entry.accepted, entry.text, entry.lengths,
                    scores=entry.scores, prompt_scores=entry.prompt_scores,
                )  # fmt: skip
                position = entry.start + len(entry.tokens)
            else:
                yield Chunk(position, end=entry.end)

    async def result(self, request_id: str, timeout_s: float | None = None) -> Answer:
        """The whole answer, once it has ended, with an error or without. Raises as `stream`."""
        chunks = [chunk async for chunk in self.stream(request_id, timeout_s)]
        end = chunks[-1].end
        if end is None:
            raise LocalError(f"request {request_id}: the stream of its result broke off")
        return Answer(
            request_id=request_id,
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=end.finish_reason,
            usage=end.usage,
            error=end.error,
            scores=tuple(score for chunk in chunks for score in chunk.scores),
            prompt_scores=tuple(score for chunk in chunks for score in chunk.prompt_scores),
        )

    async def cancel(self, request_id: str) -> None:
        """Cancel a request; its answer ends with the finish reason `cancelled`."""
        await self._connected.queue.cancel(request_id)

    async def chat(
        self,
        messages: Sequence[ChatMessage | Mapping[str, str]],
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Answer:
        """Go on with a chat and return the answer; as `generate`.

        Args:
            messages: `{"role": …, "content": …}` each; roles are system, user and assistant, and
                the last message is not the assistant's.
        """
        return await self.generate("", timeout_s=timeout_s, messages=messages, **options)

    async def generate(
        self, prompt: str = "", *, timeout_s: float | None = None, **options: Any
    ) -> Answer:
        """Submit, wait, and return the answer; options as in `submit`.

        The request is cancelled when the caller is, and when the time is up.

        Raises:
            RequestFailedError: the answer ended with an error.
            RequestTimeoutError: no end within `timeout_s` seconds.
            RequestError, StoreUnavailableError: as `submit`.
        """
        request_id = await self.submit(prompt, **options)
        try:
            answer = await self.result(request_id, timeout_s)
        except (asyncio.CancelledError, RequestTimeoutError):
            await self.cancel(request_id)
            raise
        if answer.finish_reason is FinishReason.ERROR:
            raise RequestFailedError(f"request {request_id}: {answer.error}")
        return answer

    @property
    def _connected(self) -> Store:
        if self._store is None:
            raise LocalError("the client is not connected; use `async with Client(...)`")
        return self._store
