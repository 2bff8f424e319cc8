"""Writes one answer to Redis, piece by piece and in order, off the token path.

While Redis is away pieces wait here. Every write checks that this edge still owns the prompt;
once it does not, writing stops for good and the owner is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

from bus.protocol.errors import OwnershipLostError, StoreUnavailableError
from bus.protocol.messages import FinishReason
from bus.store import (
    Claim,
    End,
    ResultGapError,
    ScoredToken,
    Store,
    TelemetryEntry,
    Usage,
    WindowEntry,
)

log = logging.getLogger(__name__)

RETRY_S = 0.5
DELAY_S = 0.002
"""Pieces wait so long, so that the next draft begins before they are encoded and written: both need
the interpreter. Nothing depends on it [ours]."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens committed at once; `start` counts generated tokens from 0. `lengths`: characters of
    `text` that each brought; what is left over was held back before. `probe`: digest of the
    target that gave the tokens. `scores`, `prompt_scores`: as in `bus.store.TokensEntry`."""

    start: int
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    text: str
    lengths: tuple[int, ...] = ()
    entry: WindowEntry | None = None
    probe: str = ""
    scores: tuple[ScoredToken, ...] = ()
    prompt_scores: tuple[ScoredToken, ...] = ()

    def with_text(self, text: str) -> Piece:
        return replace(self, text=self.text + text)


class ResultWriter:
    """The one writer of a claimed prompt's result.

    Args:
        lost: called once when another edge owns the prompt.
    """

    def __init__(self, store: Store, claim: Claim, lost: Callable[[], None]) -> None:
        self._store = store
        self._claim = claim
        self._lost = lost
        self._put: list[Piece] = []
        self._ended = False
        self._writes: asyncio.Queue[Callable[[], Awaitable[None]] | None] = asyncio.Queue()

    def put(self, piece: Piece) -> None:
        """Write `piece` after all that was put before."""
        self._put.append(piece)
        due_s = asyncio.get_running_loop().time() + DELAY_S
        self._writes.put_nowait(partial(self._append, piece, due_s))

    def end(self, reason: FinishReason, error: str, usage: Usage, *entries: TelemetryEntry) -> None:
        """End the answer after all that was put before, and add `entries` to telemetry. A second
        end changes nothing."""
        if self._ended:
            return
        self._ended = True
        self._writes.put_nowait(
            partial(self._store.queue.finish, self._claim, End(reason, error, usage))
        )
        self._writes.put_nowait(partial(self._store.telemetry.add, *entries))
        self._writes.put_nowait(None)

    def refuse(self, why: str) -> None:
        """End a prompt that cannot be answered with an error."""
        if self._claim.problem is None:
            end = End(FinishReason.ERROR, why)
            self._writes.put_nowait(partial(self._store.queue.finish, self._claim, end))
        else:
            self._writes.put_nowait(partial(self._store.queue.refuse, self._claim))
        self._writes.put_nowait(None)

    async def run(self) -> None:
        """Write until the end is written or the prompt is lost to another edge."""
        try:
            while (write := await self._writes.get()) is not None:
                await _until_written(write)
        except OwnershipLostError as error:
            log.warning("%s", error)
            self._lost()

    async def _append(self, piece: Piece, due_s: float) -> None:
        """Write one piece; a Redis restored from an older copy gets what it has lost first."""
        await asyncio.sleep(max(0.0, due_s - asyncio.get_running_loop().time()))
        try:
            await self._append_one(piece)
        except ResultGapError as gap:
            missing = [p for p in self._put if gap.next_position <= p.start <= piece.start]
            if not missing or missing[0].start != gap.next_position:
                raise
            for again in missing[: missing.index(piece) + 1]:
                await self._append_one(again)

    async def _append_one(self, piece: Piece) -> None:
        store, claim = self._store, self._claim
        if piece.entry is None:
            await store.results.append(
                claim, piece.start, piece.tokens, piece.accepted, piece.text, piece.lengths,
                probe=piece.probe, scores=piece.scores, prompt_scores=piece.prompt_scores,
            )  # fmt: skip
        else:
            await store.commit_window(
                claim, piece.start, piece.tokens, piece.accepted, piece.text, piece.entry,
                piece.lengths, piece.probe, piece.scores, piece.prompt_scores,
            )  # fmt: skip


async def _until_written(write: Callable[[], Awaitable[None]]) -> None:
    said = False
    while True:
        try:
            return await write()
        except StoreUnavailableError as error:
            if not said:
                log.warning("%s; keeping the answer and trying again", error)
            said = True
            await asyncio.sleep(RETRY_S)
