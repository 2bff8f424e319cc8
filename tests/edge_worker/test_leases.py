"""A lost lease ends the run that held it, and no other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from bus.messages import FinishReason
from bus.requests import GenerationRequest, session_id
from bus.sockets import Sockets
from bus.store import Claim
from decoding.edge_events import Ended
from edge_worker.server import EdgeWorker, Running
from edge_worker.settings import EdgeSettings
from engines.thread import ModelThread

REQUEST = GenerationRequest(id="r1", prompt="Hello")
SESSION = session_id("r1")


class SlowQueue:
    """Says that every lease is lost, when it is told to; asked again, it never answers."""

    def __init__(self) -> None:
        self.asked, self.may_answer, self.asked_again = (asyncio.Event() for _ in range(3))

    async def renew(self, edge_id: str, claims: Collection[Claim]) -> set[str]:
        if self.asked.is_set():
            self.asked_again.set()
            await asyncio.Event().wait()
        self.asked.set()
        await self.may_answer.wait()
        return {claim.request_id for claim in claims}


class Recorder:
    """A session that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def handle(self, event: Any) -> None:
        self.told.append(event)


def running(term: int) -> Running:
    claim = Claim("1-0", "r1", REQUEST, None, given_up=False, term=term, deliveries=term)
    return Running(claim, REQUEST, Recorder())  # type: ignore[arg-type]


async def test_a_prompt_claimed_again_meanwhile_goes_on() -> None:
    """Redis was silent: our lease ran out, and this same edge claims the prompt again before it is
    told that the old lease is lost."""
    settings, queue = EdgeSettings.load(lease_s=0.06), SlowQueue()
    sockets, thread = Sockets(settings), ModelThread(1)
    model: Any = SimpleNamespace(tokenizer_digest="d", vocab_size=8, context_length=64)
    store: Any = SimpleNamespace(queue=queue, stories=None)
    try:
        worker = EdgeWorker(settings, model, thread, sockets, store)
        old, new = running(term=1), running(term=2)
        worker._running[SESSION] = old
        renewing = asyncio.create_task(worker.renew_forever())
        await queue.asked.wait()
        worker._running[SESSION] = new
        queue.may_answer.set()
        async with asyncio.timeout(5.0):
            await queue.asked_again.wait()  # for the new lease, which is not lost
        renewing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await renewing
        assert old.session.told == [Ended(FinishReason.CANCELLED)]  # type: ignore[attr-defined]
        assert not new.lost
        assert new.session.told == []  # type: ignore[attr-defined]
    finally:
        sockets.close()
        thread.close()
