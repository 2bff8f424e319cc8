"""One answer, with the times at which its pieces came to the reader."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.answers import read_answer
from bench.evaluation.target_server import TargetAlone
from bus.client import Client
from bus.store import Usage


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """An answer as its reader got it.

    Attributes:
        session: of the answer; empty for the target alone.
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
    alone: TargetAlone, prompt: Sequence[int], max_new_tokens: int
) -> TimedAnswer:
    """By the target alone, token by token."""
    began = time.perf_counter()
    tokens, came = [], []
    async for token in alone.stream(prompt, max_new_tokens):
        tokens.append(token)
        came.append(time.perf_counter() - began)
    return TimedAnswer(
        "", tuple(tokens), None, tuple(came), came[-1], len(tokens) - 1, came[-1] - came[0]
    )
