"""Results: edges append pieces to a stream, clients read it while it grows.

The append script checks owner and position, so the stream is the answer, whatever crashed on the
way. This module does not know where tokens come from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec

from bus.protocol.errors import (
    LocalError,
    OwnershipLostError,
    RequestFailedError,
    RequestTimeoutError,
    StoreUnavailableError,
)
from bus.store.connection import Connection
from bus.store.entries import EndEntry, ScoredToken, TokensEntry, parse_result_entry
from bus.store.keys import Keys
from bus.store.queue import Claim
from bus.store.telemetry import MAX_TELEMETRY

__all__ = ["ResultGapError", "Results"]

_POLL_MS = 1000
_OUTAGE_S = 30.0
_OUTAGE_PAUSE_S = 0.25
_READ_COUNT = 200


class ResultGapError(LocalError):
    """A piece does not start where the result ends; `next_position` says where that is."""

    def __init__(self, request_id: str, start: int, next_position: int) -> None:
        super().__init__(
            f"request {request_id}: a piece starts at token {start}, the result goes on at "
            f"{next_position}; append what is missing, or exactly the last piece to repeat it"
        )
        self.next_position = next_position


class Results:
    """Append and read. Every method raises StoreUnavailableError without Redis."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys

    async def append(
        self,
        claim: Claim,
        start: int,
        tokens: Sequence[int],
        accepted: Sequence[bool],
        text: str,
        lengths: Sequence[int] = (),
        telemetry: Mapping[str, str] | None = None,
        probe: str = "",
        scores: Sequence[ScoredToken] = (),
        prompt_scores: Sequence[ScoredToken] = (),
    ) -> None:
        """Add a piece to the result; a repeat of the last piece changes nothing.

        Args:
            claim: the caller's claim; its term must be the current one.
            start: index of the piece's first token within the answer.
            tokens: ids, possibly none where only held-back text comes out.
            accepted: for each token, whether it was drafted and accepted.
            text: what the piece adds to the text.
            lengths: characters of it that each token brought; none where nobody knows.
            telemetry: fields of an entry to add to the telemetry in the same step.
            probe: probe digest of the target that gave the tokens, where known.
            scores, prompt_scores: see `TokensEntry`.

        Raises:
            OwnershipLostError: another term has begun, or the request has ended.
            ResultGapError: `start` is not the next position.
        """
        if len(tokens) != len(accepted):
            raise LocalError(f"{len(tokens)} tokens but {len(accepted)} accepted flags")
        answer = await self._connection.run_script(
            "append",
            [
                self._keys.request(claim.request_id),
                self._keys.result(claim.request_id),
                self._keys.telemetry,
            ],
            [
                claim.term,
                start,
                len(tokens),
                msgspec.json.encode(list(tokens)),
                msgspec.json.encode([int(flag) for flag in accepted]),
                text,
                msgspec.json.encode(list(lengths)),
                probe,
                msgspec.json.encode(list(scores)) if scores else "",
                msgspec.json.encode(list(prompt_scores)) if prompt_scores else "",
                MAX_TELEMETRY,
                *(word for pair in (telemetry or {}).items() for word in pair),
            ],
        )
        if answer[0] == b"lost":
            raise OwnershipLostError(
                f"request {claim.request_id}: another edge owns it now, or it has ended "
                f"(our term was {claim.term}); the tokens from {start} were not written"
            )
        if answer[0] == b"gap":
            raise ResultGapError(claim.request_id, start, answer[1])

    async def so_far(self, request_id: str) -> tuple[list[TokensEntry | EndEntry], str]:
        """What is written now, and the request's state in the queue (empty: nobody knows it).

        Raises:
            RemoteError: the result was not written by this project.
        """
        entries, state = await self._connection.execute_many(
            [
                ("XRANGE", self._keys.result(request_id), "-", "+"),
                ("HGET", self._keys.request(request_id), "state"),
            ]
        )
        found = [parse_result_entry(entry_id, fields) for entry_id, fields in entries]
        return found, (state or b"").decode()

    async def read(
        self, request_id: str, after: str = "0", timeout_s: float | None = None
    ) -> AsyncIterator[TokensEntry | EndEntry]:
        """The entries of a result as they come; the last one is an EndEntry.

        Waits through Redis outages of up to 30 s.

        Args:
            request_id: whose result.
            after: entry id to continue after; "0" is the beginning.
            timeout_s: seconds for the whole answer; None waits as long as it takes.

        Raises:
            RequestTimeoutError: the end did not come within `timeout_s`.
            RequestFailedError: the request was there and is gone without an end.
        """
        deadline = None
        if timeout_s is not None:
            deadline = asyncio.get_running_loop().time() + timeout_s
        reader = _Reader(self._connection, self._keys, request_id, after)
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    entries = await reader.next_entries()
            except TimeoutError:
                raise RequestTimeoutError(
                    f"request {request_id}: no end within {timeout_s:g} s"
                    f"{reader.trouble}; it goes on unless it is cancelled"
                ) from None
            for entry in entries:
                yield entry
                if isinstance(entry, EndEntry):
                    return


class _Reader:
    """The position of one reader in one result."""

    def __init__(self, connection: Connection, keys: Keys, request_id: str, after: str) -> None:
        self._connection = connection
        self._request_key = keys.request(request_id)
        self._result_key = keys.result(request_id)
        self._request_id = request_id
        self._after = after
        self._position = 0
        self._seen = False
        self.trouble = ""

    async def next_entries(self) -> list[TokensEntry | EndEntry]:
        """At least one new entry. Raises as `Results.read`."""
        loop = asyncio.get_running_loop()
        last_answer = loop.time()
        while True:
            try:
                found = await self._read()
                if not found:
                    await self._check_still_there()
                last_answer = loop.time()
                self.trouble = ""
            except StoreUnavailableError as error:
                if loop.time() - last_answer > _OUTAGE_S:
                    raise
                self.trouble = f" ({error})"
                await asyncio.sleep(_OUTAGE_PAUSE_S)
                continue
            if found:
                return found

    async def _read(self) -> list[TokensEntry | EndEntry]:
        reply = await self._connection.execute_blocking(
            "XREAD", "COUNT", _READ_COUNT, "BLOCK", _POLL_MS,
            "STREAMS", self._result_key, self._after,
        )  # fmt: skip
        fresh: list[TokensEntry | EndEntry] = []
        for entry_id, fields in reply[0][1] if reply else ():
            entry = parse_result_entry(entry_id, fields)
            self._after, self._seen = entry.entry_id, True
            if isinstance(entry, TokensEntry):
                # Redis restored from an older copy: its owner writes again what we have read.
                if entry.tokens and entry.start < self._position:
                    continue
                self._position = entry.start + len(entry.tokens)
            fresh.append(entry)
        return fresh

    async def _check_still_there(self) -> None:
        """A request that was there and is gone will get no answer; do not wait for it."""
        there = bool(await self._connection.execute("EXISTS", self._request_key, self._result_key))
        if self._seen and not there:
            raise RequestFailedError(
                f"request {self._request_id} is gone without an end: Redis was emptied or the "
                "result expired; submit it again"
            )
        self._seen = self._seen or there
