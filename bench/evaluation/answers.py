"""One answer, with the times at which its pieces came to the reader."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from bench.answers import read_answer
from bench.evaluation.baseline_server import BaselineServer
from bench.evaluation.colocated import Piece
from bus.client import Client
from bus.store import Usage


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """An answer as its reader got it.

    Attributes:
        session: of the answer; empty for baselines of one process.
        text: None where only tokens came.
        came_s: when each piece came, in seconds from the submission.
        seconds: until the last one.
        decode_tokens, decode_seconds: as in `bus.store.Usage`.
    """

    session: str
    token_ids: tuple[int, ...]
    text: str | None
    came_s: tuple[float, ...]
    seconds: float
    decode_tokens: int
    decode_seconds: float
    usage: Usage | None = None

    def gap_ms(self, percent: float) -> float:
        """A percentile of the time between two pieces; 0 where there is only one."""
        gaps = np.diff(self.came_s)
        return float(1e3 * np.percentile(gaps, percent)) if gaps.size else 0.0

    @property
    def first_token_ms(self) -> float:
        return 1e3 * self.came_s[0] if self.came_s else 1e3 * self.seconds


async def answer_together(client: Client, prompt: str, **options: Any) -> TimedAnswer:
    """By draft and target, through the queue; options as in `Client.submit`.

    Raises:
        RequestFailedError: it ended with an error.
    """
    got = await read_answer(client, prompt, temperature=0.0, **options)
    return TimedAnswer(
        got.session, got.token_ids, got.text, got.came_s,
        got.came_s[-1] if got.came_s else got.ended_s,
        got.usage.decode_tokens, got.usage.decode_seconds, got.usage,
    )  # fmt: skip


async def answer_alone(
    server: BaselineServer, prompt: Sequence[int], max_new_tokens: int, on_edge: bool = False
) -> TimedAnswer:
    """By the target alone, token by token: in the cloud over the link, or on the edge."""
    pieces, came, _ = await _read(server.stream(prompt, max_new_tokens, on_edge=on_edge))
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return TimedAnswer("", tokens, None, came, came[-1], len(tokens) - 1, came[-1] - came[0])


async def answer_colocated(
    server: BaselineServer, prompt: Sequence[int], max_new_tokens: int, window: int
) -> TimedAnswer:
    """By draft and target together in the cloud, over the link, a piece for each pass."""
    pieces, came, num_bytes = await _read(server.stream(prompt, max_new_tokens, window))
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    decode_tokens, decode_s = len(tokens) - len(pieces[0].tokens), came[-1] - came[0]
    drafted, accepted = sum(p.num_drafted for p in pieces), sum(p.num_accepted for p in pieces)
    windows = [piece for piece in pieces if piece.num_drafted]
    usage = Usage(
        prompt_tokens=len(prompt), completion_tokens=len(tokens), drafted_tokens=drafted,
        accepted_tokens=accepted, wasted_tokens=drafted - accepted, windows=len(windows),
        rollbacks=sum(piece.num_accepted < piece.num_drafted for piece in windows),
        acceptance=accepted / max(drafted, 1), passes=len(pieces), seconds=came[-1],
        tokens_per_s=len(tokens) / came[-1], bytes_down=num_bytes, edge_idle=1.0, cloud_idle=0.0,
        decode_tokens=decode_tokens, decode_seconds=decode_s,
    )  # fmt: skip
    return TimedAnswer("", tokens, None, came, came[-1], decode_tokens, decode_s, usage)


async def _read(stream: AsyncIterator[Piece]) -> tuple[list[Piece], tuple[float, ...], int]:
    """Pieces, when each came in seconds from now, and their bytes."""
    began = time.perf_counter()
    pieces, came, num_bytes = [], [], 0
    async for piece in stream:
        pieces.append(piece)
        came.append(time.perf_counter() - began)
        num_bytes += len(msgspec.msgpack.encode(piece))
    return pieces, tuple(came), num_bytes
