"""What HTTP adds to the raw queue: answers by both, alternated, on one running stack.

*Measured*, on real processes of the default pair: the same prompts, greedy, so that both doors give
the same tokens. Beside each HTTP answer a second reader takes the same pieces from Redis: what a
piece is later through the gateway than there is free of the target's own noise.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import httpx2
import msgspec
import numpy as np

from bench.gateway.streams import Streamed, stream
from bench.ranges import Interval, paired_interval
from bus.client import Client


class Overhead(msgspec.Struct, frozen=True):
    """HTTP − queue, medians over pairs of answers with 95 % intervals.

    Attributes:
        first_ms: time to the first piece of text. token_ms: time of a token after that.
        piece_ms: how much later a piece of the same answer comes by HTTP; piece_p99_ms: of 99 %.
        same_text: pairs whose texts are the same.
    """

    answers: int
    same_text: int
    queue_first_ms: float
    http_first_ms: float
    queue_token_ms: float
    http_token_ms: float
    first_ms: Interval
    token_ms: Interval
    piece_ms: float
    piece_p99_ms: float
    num_pieces: int


@dataclass
class _Answer:
    began_s: float
    text: str = ""
    num_tokens: int = 0
    at_s: list[float] = field(default_factory=list)

    @property
    def first_ms(self) -> float:
        return 1e3 * (self.at_s[0] - self.began_s)

    @property
    def token_ms(self) -> float:
        return 1e3 * (self.at_s[-1] - self.at_s[0]) / max(self.num_tokens - 1, 1)


async def pair_of_answers(
    client: Client, http: httpx2.AsyncClient, prompt: str, max_tokens: int, http_first: bool
) -> tuple[_Answer, _Answer, list[float]]:
    """By the queue and by HTTP, one after the other, and how much later each piece came by the
    latter than to a reader of the queue beside it, in milliseconds."""

    async def by_http() -> tuple[_Answer, list[float]]:
        return await _by_http(client, http, prompt, max_tokens)

    if http_first:
        given, late = await by_http()
        return await _by_queue(client, prompt, max_tokens), given, late
    queue = await _by_queue(client, prompt, max_tokens)
    given, late = await by_http()
    return queue, given, late


async def _by_queue(client: Client, prompt: str, max_tokens: int) -> _Answer:
    answer = _Answer(time.perf_counter())
    request_id = await client.submit(prompt, max_new_tokens=max_tokens)
    async for chunk in client.stream(request_id):
        if chunk.text:
            answer.text += chunk.text
            answer.at_s.append(time.perf_counter())
        answer.num_tokens += len(chunk.token_ids)
    return answer


async def _by_http(
    client: Client, http: httpx2.AsyncClient, prompt: str, max_tokens: int
) -> tuple[_Answer, list[float]]:
    """Two readers of one answer: this one's client and, by the request's id, one of the queue."""
    answer, beside = _Answer(time.perf_counter()), dict[int, float]()
    got = Streamed()

    async def read_beside() -> None:
        while not got.request_id:  # noqa: ASYNC110 - a plain attribute
            await asyncio.sleep(0.001)
        length = 0
        async for chunk in client.stream(got.request_id):
            if chunk.text:
                length += len(chunk.text)
                beside[length] = time.perf_counter()

    reading = asyncio.create_task(read_beside())
    await stream(http, prompt, max_tokens, into=got)
    await reading
    answer.text, answer.num_tokens, answer.at_s = got.text, got.num_tokens, got.at_s
    known_s = got.at_s[0]  # before, the reader beside did not know the request
    late = [
        1e3 * (at_s - beside[length])
        for length, at_s in zip(got.lengths, got.at_s, strict=True)
        if length in beside and at_s > known_s
    ]
    return answer, late


def summarized(pairs: list[tuple[_Answer, _Answer, list[float]]]) -> Overhead:
    """Of all pairs of answers."""

    def medians(of: str) -> tuple[float, float, Interval]:
        columns = [np.array([getattr(pair[side], of) for pair in pairs]) for side in (0, 1)]
        queue, http = columns
        difference = paired_interval(
            (queue, http), lambda a, b, axis=-1: np.median(b - a, axis=axis)
        )
        return float(np.median(queue)), float(np.median(http)), difference

    queue_first, http_first, first = medians("first_ms")
    queue_token, http_token, token = medians("token_ms")
    late = np.array([delay for _, _, delays in pairs for delay in delays])
    return Overhead(
        answers=len(pairs),
        same_text=sum(queue.text == http.text for queue, http, _ in pairs),
        queue_first_ms=queue_first,
        http_first_ms=http_first,
        queue_token_ms=queue_token,
        http_token_ms=http_token,
        first_ms=first,
        token_ms=token,
        piece_ms=float(np.median(late)) if late.size else float("nan"),
        piece_p99_ms=float(np.percentile(late, 99)) if late.size else float("nan"),
        num_pieces=int(late.size),
    )
