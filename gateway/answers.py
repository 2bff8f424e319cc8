"""The requests of one HTTP request: submitted together, read as they are answered, cancelled
together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from bus.protocol.errors import E2SCIError
from bus.protocol.requests import GenerationRequest
from bus.store import End, EndEntry, FinishReason, Store, TokensEntry
from gateway.errors import api_error_of, end_error
from gateway.limits import Slots
from gateway.metrics import AnswerTimes, GatewayMetrics

__all__ = ["Answers", "Canceller", "Piece"]

log = logging.getLogger(__name__)

_AHEAD = 64
"""Pieces read ahead of what the client has taken; then reading waits for it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Something of choice `index`: tokens, or its end."""

    index: int
    tokens: TokensEntry | None = None
    end: End | None = None


class Canceller:
    """Cancels requests whose clients have gone, while nothing waits for it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tasks: set[asyncio.Task[None]] = set()

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Begin to cancel; each request that has ended already stays as it is."""
        if request_ids:
            task = asyncio.create_task(self._cancel(request_ids))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            try:
                await self._store.queue.cancel(request_id)
            except E2SCIError as error:
                log.warning("request %s was not cancelled: %s", request_id, error)

    async def finish(self) -> None:
        """Wait until all that has begun is done."""
        while self._tasks:
            await asyncio.wait(self._tasks)


class Answers:
    """Choices 0 … n - 1, one request of the queue each. `close` must be called."""

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        *,
        store: Store,
        slots: Slots,
        metrics: GatewayMetrics,
        canceller: Canceller,
        timeout_s: float,
    ) -> None:
        self.requests = tuple(requests)
        self._store = store
        self._slots = slots
        self._canceller = canceller
        self._timeout_s = timeout_s
        self._times = [AnswerTimes(metrics) for _ in requests]
        self._arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue(_AHEAD)
        self._first: Piece | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._submitted: list[str] = []
        self._ended: set[str] = set()
        self._started: set[int] = set()

    @property
    def ids(self) -> list[str]:
        """Of the requests, by choice."""
        return [request.id for request in self.requests]

    async def submit(self) -> None:
        """Queue all requests and begin to read.

        Raises:
            ApiError: too many are running here.
            QueueFullError, RequestError, StoreUnavailableError: as `Queue.submit`; `close` cancels
                those that have been queued.
        """
        self._slots.take(len(self.requests))
        for index, request in enumerate(self.requests):
            self._submitted.append(request.id)  # before: a lost reply leaves it queued
            await self._store.queue.submit(request)
            self._times[index].submitted()
            reader = asyncio.create_task(self._read(index, request.id))
            reader.add_done_callback(self._failed)
            self._readers.append(reader)

    async def started(self, timeout_s: float) -> None:
        """Return once something has come, at the latest after `timeout_s`.

        Raises:
            ApiError: the first that came is an end with an error, or reading failed.
        """
        self._first = await self._next(timeout_s)

    async def pieces(self, idle_s: float) -> AsyncIterator[Piece | None]:
        """Everything as it comes, up to the end of every choice; None after `idle_s` without.

        Raises:
            ApiError: a choice ended with an error, or reading failed.
        """
        while len(self._ended) < len(self.requests) or self._first is not None:
            piece, self._first = self._first, None
            yield piece or await self._next(idle_s)

    def close(self) -> None:
        """Stop reading, and cancel what has not ended. A second call does nothing."""
        for reader in self._readers:
            reader.cancel()
        for times in self._times:
            times.closed()
        if self._submitted:
            self._slots.give_back(len(self.requests))
        self._canceller.cancel([one for one in self._submitted if one not in self._ended])
        self._submitted = []

    async def _next(self, timeout_s: float) -> Piece | None:
        try:
            async with asyncio.timeout(timeout_s):
                arrived = await self._arrived.get()
        except TimeoutError:
            return None
        if isinstance(arrived, Exception):
            raise api_error_of(arrived) from arrived
        times = self._times[arrived.index]
        if arrived.tokens is not None:
            times.arrived(len(arrived.tokens.tokens))
            self._started.add(arrived.index)
        if arrived.end is not None:
            self._ended.add(self.requests[arrived.index].id)
            times.ended(arrived.end)
            if arrived.end.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
                raise end_error(arrived.end, arrived.index in self._started)
        return arrived

    async def _read(self, index: int, request_id: str) -> None:
        async for entry in self._store.results.read(request_id, timeout_s=self._timeout_s):
            if isinstance(entry, EndEntry):
                await self._arrived.put(Piece(index, end=entry.end))
            else:
                await self._arrived.put(Piece(index, tokens=entry))

    def _failed(self, reader: asyncio.Task[None]) -> None:
        if reader.cancelled():
            return
        error = reader.exception()
        if isinstance(error, Exception):
            if not isinstance(error, E2SCIError):
                log.error("a result could not be read", exc_info=error)
            while self._arrived.full():  # what came before the failure is of no use any more
                self._arrived.get_nowait()
            self._arrived.put_nowait(error)
