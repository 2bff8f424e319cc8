"""The prompt queue: one Redis stream, one consumer group, leases that pass from edge to edge.

A request is *queued* until an edge claims it, *running* while one holds its lease, and *done*
once its end entry is written, which also takes it off the stream. Each claim raises the term; every
later write names its term, and a script refuses the write of an older one. So an edge that was
paused, cut off or killed can never write beside the edge that took over.

This module knows entries, leases and terms. It does not know how an answer is made.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec

from bus.protocol.errors import OwnershipLostError, QueueFullError, RemoteError, RequestError
from bus.protocol.requests import GenerationRequest
from bus.settings import BusSettings
from bus.store.connection import MAX_BLOCK_MS, CommandRefusedError, Connection
from bus.store.entries import End, FinishReason, TokensEntry, parse_result_entry
from bus.store.keys import GROUP, Keys

__all__ = ["Claim", "Queue", "QueueDepth"]

_MAX_DEAD = 1000


@dataclass(frozen=True, slots=True)
class Claim:
    """A request this edge owns until another term begins.

    Attributes:
        entry_id: the stream entry.
        request_id: names the result stream.
        request: the request, None where it cannot be run; `problem` then says why.
        problem: why the request is to be refused (see `Queue.refuse`), else None.
        given_up: the problem is that too many deliveries ended without an end.
        term: of this claim; every write names it.
        deliveries: claims so far, this one included.
        streamed_tokens: ids that earlier owners have put into the result already.
        streamed_text: the text they put there.
        streamed_probes: probe digests of the targets that gave these tokens, in order, without
            repeats in a row; "" where an entry does not say.
    """

    entry_id: str
    request_id: str
    request: GenerationRequest | None
    problem: str | None
    given_up: bool
    term: int
    deliveries: int
    streamed_tokens: tuple[int, ...] = ()
    streamed_text: str = ""
    streamed_probes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How full the queue is.

    Attributes:
        length: requests queued and running.
        pending: of these, handed to an edge.
        oldest_age_s: seconds since the oldest of them came in, 0 for an empty queue.
    """

    length: int
    pending: int
    oldest_age_s: float


class Queue:
    """Submit, take, renew, finish. Every method raises StoreUnavailableError without Redis."""

    def __init__(self, connection: Connection, keys: Keys, settings: BusSettings) -> None:
        self._connection = connection
        self._keys = keys
        self._max_queue = settings.max_queue
        self._lease_ms = round(settings.lease_s * 1000)
        self._ttl_s = settings.result_ttl_s
        self._max_deliveries = settings.max_deliveries

    async def submit(self, request: GenerationRequest) -> str:
        """Queue a request; returns its id.

        Raises:
            QueueFullError: `max_queue` requests are queued or running.
            RequestError: the id is in use.
        """
        fields = [word for pair in request.to_fields().items() for word in pair]
        answer, detail = await self._connection.run_script(
            "submit",
            [self._keys.prompts, self._keys.request(request.id)],
            [self._max_queue, secrets.token_hex(8), str(request.seed), *fields],
        )
        if answer == b"full":
            raise QueueFullError(
                f"the queue holds {detail} requests, the limit is {self._max_queue}; "
                "try again later"
            )
        if answer == b"duplicate":
            raise RequestError(
                f"request id {request.id!r} is in use ({detail.decode()}); choose another"
            )
        return request.id

    async def ensure_group(self) -> None:
        """Make stream and consumer group where they are missing; the group sees every entry."""
        try:
            await self._connection.execute(
                "XGROUP", "CREATE", self._keys.prompts, GROUP, "0", "MKSTREAM"
            )
        except CommandRefusedError as error:
            if not error.has_code("BUSYGROUP"):
                raise

    async def take(self, edge_id: str, block_ms: int) -> Claim | None:
        """Claim one request: first one whose owner went silent, else a new one.

        Waits up to `block_ms` (at most 5 s) for a new one; None: there was nothing to do.
        """
        try:
            return await self._take(edge_id, block_ms)
        except CommandRefusedError as error:
            if not error.has_code("NOGROUP"):
                raise
        await self.ensure_group()  # first start, or Redis came back empty
        return await self._take(edge_id, block_ms)

    async def _take(self, edge_id: str, block_ms: int) -> Claim | None:
        claim = await self._claim(edge_id, "")
        if claim is not None:
            return claim
        # BLOCK 0 would wait for ever.
        block_ms = min(max(block_ms, 1), MAX_BLOCK_MS)
        reply = await self._connection.execute_blocking(
            "XREADGROUP", "GROUP", GROUP, edge_id, "COUNT", 1, "BLOCK", block_ms,
            "STREAMS", self._keys.prompts, ">",
        )  # fmt: skip
        if not reply:
            return None
        [[_, [(entry_id, _)]]] = reply
        return await self._claim(edge_id, entry_id)

    async def _claim(self, edge_id: str, entry_id: str | bytes) -> Claim | None:
        reply = await self._connection.run_script(
            "claim",
            [self._keys.prompts],
            [
                self._keys.prefix,
                GROUP,
                edge_id,
                self._lease_ms,
                self._max_deliveries,
                entry_id,
            ],
        )
        return None if reply is None else _read_claim(reply)

    async def renew(self, edge_id: str, claims: Collection[Claim]) -> set[str]:
        """Renew the leases; returns the ids of requests that are not this edge's any more."""
        if not claims:
            return set()
        keys, args = [self._keys.prompts], [GROUP, edge_id, str(self._ttl_s)]
        for claim in claims:
            keys += [self._keys.request(claim.request_id), self._keys.result(claim.request_id)]
            args += [claim.entry_id, str(claim.term)]
        lost = await self._connection.run_script("renew", keys, args)
        ids = [claim.request_id for claim in claims]
        return {ids[index] for index in lost}

    async def release(self, claim: Claim) -> None:
        """Hand a request back at once, as if it had not been delivered.

        Nothing happens where it is not ours any more: then it is in good hands already.
        """
        await self._connection.run_script(
            "release",
            [self._keys.prompts, self._keys.request(claim.request_id)],
            [GROUP, claim.entry_id, claim.term],
        )

    async def finish(self, claim: Claim, end: End) -> None:
        """Write the end entry and take the request off the queue, both or neither.

        Raises:
            OwnershipLostError: another term has begun. A repeat of a finish that was carried out
                raises nothing and changes nothing.
        """
        await self._finish(claim, end, burial="")

    async def bury(self, claim: Claim, reason: str) -> None:
        """Move the request to the dead letters and end its result with `reason` as the error.

        Raises:
            OwnershipLostError: another term has begun.
        """
        await self._finish(claim, End(FinishReason.ERROR, reason), burial=reason)

    async def refuse(self, claim: Claim) -> None:
        """End a claim that has a problem: an error result; given up, also a dead letter.

        Raises:
            OwnershipLostError: another term has begun.
        """
        reason = claim.problem or "refused"
        if claim.given_up:
            await self.bury(claim, reason)
        else:
            await self.finish(claim, End(FinishReason.ERROR, reason))

    async def _finish(self, claim: Claim, end: End, burial: str) -> None:
        keys, request_id = self._keys, claim.request_id
        ended = await self._connection.run_script(
            "finish",
            [
                keys.prompts,
                keys.request(request_id),
                keys.result(request_id),
                keys.cancel(request_id),
                keys.dead,
            ],
            [
                GROUP,
                request_id,
                claim.entry_id,
                claim.term,
                self._ttl_s,
                end.finish_reason.value,
                _encodable(end.error),
                msgspec.json.encode(end.usage),
                _encodable(burial),
                _MAX_DEAD,
            ],
        )
        if not ended:
            raise OwnershipLostError(
                f"request {request_id}: another edge owns it now (our term was {claim.term}); "
                "its end was not written"
            )

    async def cancel(self, request_id: str) -> None:
        """Cancel a request: at once where it waits, through its edge where it runs.

        Nothing happens to one that has ended.
        """
        keys = self._keys
        await self._connection.run_script(
            "cancel",
            [
                keys.prompts,
                keys.request(request_id),
                keys.result(request_id),
                keys.cancel(request_id),
            ],
            [GROUP, self._ttl_s],
        )

    async def cancelled(self, request_ids: Iterable[str]) -> set[str]:
        """Which of these running requests somebody wants cancelled."""
        ids = list(request_ids)
        if not ids:
            return set()
        marks = await self._connection.execute("MGET", *map(self._keys.cancel, ids))
        return {name for name, mark in zip(ids, marks, strict=True) if mark is not None}

    async def depth(self) -> QueueDepth:
        """How full the queue is; zeros where there is none yet."""
        prompts = self._keys.prompts
        length, oldest, now = await self._connection.execute_many(
            [("XLEN", prompts), ("XRANGE", prompts, "-", "+", "COUNT", 1), ("TIME",)]
        )
        age_s = max(0.0, _seconds(now) - _entry_seconds(oldest[0][0])) if oldest else 0.0
        try:
            summary = await self._connection.execute("XPENDING", prompts, GROUP)
        except CommandRefusedError as error:
            if not error.has_code("NOGROUP"):
                raise
            return QueueDepth(length, 0, age_s)
        return QueueDepth(length, summary["pending"], age_s)


def _read_claim(reply: Sequence[Any]) -> Claim:
    entry, words, request_id, taken, term, deliveries, given_up, streamed = reply
    entry_id, fields = entry.decode(), _pairs(words)
    request, problem = _read_request(entry_id, fields)
    if taken:
        problem = f"id: {fields[b'id'].decode()!r} is in use by another request; choose another"
    if given_up:
        problem = (
            f"given up after {deliveries} deliveries: every edge that took this request stopped "
            "before its end"
        )
    try:
        pieces = _read_pieces(streamed)
    except RemoteError as error:
        pieces, problem = [], str(error)
    return Claim(
        entry_id=entry_id,
        request_id=request_id.decode(),
        request=None if problem else request,
        problem=problem,
        given_up=bool(given_up),
        term=term,
        deliveries=deliveries,
        streamed_tokens=tuple(token for piece in pieces for token in piece.tokens),
        streamed_text="".join(piece.text for piece in pieces),
        streamed_probes=tuple(
            probe for probe, _ in groupby(piece.probe for piece in pieces if piece.tokens)
        ),
    )


def _read_pieces(streamed: Sequence[Any]) -> list[TokensEntry]:
    entries = [parse_result_entry(name, _pairs(words)) for name, words in streamed]
    return [entry for entry in entries if isinstance(entry, TokensEntry)]


def _read_request(
    entry_id: str, fields: dict[bytes, bytes]
) -> tuple[GenerationRequest | None, str | None]:
    try:
        return GenerationRequest.from_fields(entry_id, fields), None
    except RequestError as error:
        return None, str(error)


def _pairs(words: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(words[::2], words[1::2], strict=True))


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _seconds(time: tuple[int, int]) -> float:
    return time[0] + time[1] / 1e6


def _entry_seconds(entry_id: bytes) -> float:
    return int(entry_id.split(b"-")[0]) / 1000
