"""An edge that takes requests from a real queue and writes prepared pieces: no models, no cloud."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from bus.protocol.requests import GenerationRequest
from bus.store import (
    Alternative,
    Claim,
    End,
    FinishReason,
    Role,
    ScoredToken,
    Store,
    Usage,
    WorkerRecord,
)

MODEL = "tiny-target"
PROBE = "ab" * 32
WORDS = ("Hello", " there", ",", " world", "!")
_POLL_S = 0.01


def scored(number: int, text: str, num_top: int) -> ScoredToken:
    """A token whose log-probability says which one it is."""
    top = tuple(
        Alternative(
            number + place, -0.5 * (place + 1), (text if not place else f"~{place}").encode()
        )
        for place in range(num_top)
    )
    return ScoredToken(Alternative(number, -0.5, text.encode()), top)


@dataclass
class ScriptedEdge:
    """Answers every request with `words`, a token each, in pieces of two.

    Attributes:
        seen: the requests, in the order they were claimed.
        cancelled: ids of those that ended cancelled.
        error: end with this error, after `error_after` pieces and `error_s` seconds of work.
        held: pause after the first piece until this is set, or until the request is cancelled.
    """

    store: Store
    words: Sequence[str] = WORDS
    seen: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    error: str = ""
    error_after: int = 0
    error_s: float = 0.0
    held: asyncio.Event | None = None
    prompt_tokens: int = 7
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def register(self, *roles: Role) -> None:
        """Put records of workers into the registry."""
        for role in roles or (Role.EDGE, Role.CLOUD):
            await self.store.registry.beat(
                WorkerRecord(
                    worker_id=f"{role}-1", role=role, boot="b", model=MODEL, probe_digest=PROBE,
                    tokenizer_digest="digest", context_length=4096, started_at=1_700_000_000.0,
                )
            )  # fmt: skip

    async def run(self) -> None:
        """Take requests until cancelled."""
        beat = asyncio.create_task(self._beat())
        try:
            while True:
                claim = await self.store.queue.take("edge-1", 1000)
                if claim is not None:
                    task = asyncio.create_task(self._answer(claim))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        finally:
            for task in (beat, *self._tasks):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _beat(self) -> None:
        while True:
            await self.register()
            await asyncio.sleep(1)

    async def _answer(self, claim: Claim) -> None:
        request = claim.request
        if request is None:
            await self.store.queue.refuse(claim)
            return
        self.seen.append(request)
        words = list(self.words)[: request.max_new_tokens]
        for number, start in enumerate(range(0, len(words), 2)):
            if self.error and number == self.error_after:
                break
            await self._write(claim, request, start, words[start : start + 2])
            if self.held is not None and number == 0 and not await self._released(request.id):
                self.cancelled.append(request.id)
                await self._end(claim, request, FinishReason.CANCELLED, start + 2)
                return
        if self.error:
            ran = Usage(seconds=self.error_s)
            await self.store.queue.finish(claim, End(FinishReason.ERROR, self.error, ran))
            return
        full = len(words) < len(self.words)
        reason = FinishReason.LENGTH if full else FinishReason.STOP
        await self._end(claim, request, reason, len(words))

    async def _write(
        self, claim: Claim, request: GenerationRequest, start: int, words: Sequence[str]
    ) -> None:
        top = request.logprobs
        prompt = ["", " b", " c"] if request.prompt_logprobs and start == 0 else []
        await self.store.results.append(
            claim,
            start,
            range(start, start + len(words)),
            [True] * len(words),
            "".join(words),
            [len(word) for word in words],
            scores=[] if top is None else [
                scored(start + number, word, top) for number, word in enumerate(words)
            ],
            prompt_scores=[
                scored(100 + number, word or "a", (top or 0) if number else 0)
                for number, word in enumerate(prompt)
            ],
        )  # fmt: skip

    async def _released(self, request_id: str) -> bool:
        assert self.held is not None
        while not self.held.is_set():
            if await self.store.queue.cancelled([request_id]):
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def _end(
        self, claim: Claim, request: GenerationRequest, reason: FinishReason, num_tokens: int
    ) -> None:
        usage = Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=num_tokens,
            drafted_tokens=8,
            accepted_tokens=6,
            rollbacks=1,
            seconds=0.5,
        )
        await self.store.queue.finish(claim, End(reason, "", usage))
