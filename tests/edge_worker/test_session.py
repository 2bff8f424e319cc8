"""The end of an edge session, whatever ends it: its cache goes to the prefix cache, once."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from bus.protocol.messages import FinishReason
from decoding import edge, methods
from decoding.edge_events import Ended
from decoding.sampling import SamplingParams
from edge_worker.memory import PathMemory
from edge_worker.session import EdgeSession, SessionContext
from engines.thread import ModelThread


def spec() -> edge.SessionSpec:
    method = methods.find("sd")
    assert method is not None
    return edge.SessionSpec(
        session="s1", client="c", edge="edge-1", method=method, prompt=(1, 2, 3),
        sampling=SamplingParams(), max_new_tokens=8, tokenizer_digest="t",
    )  # fmt: skip


@pytest.mark.parametrize("reason", [None, FinishReason.STOP, FinishReason.CANCELLED])
async def test_a_session_gives_its_cache_back_once(reason: FinishReason | None) -> None:
    cache, given_back = object(), []
    model: Any = SimpleNamespace(
        open=lambda *_: cache,
        close=lambda held: given_back.append((held, threading.current_thread().name)),
    )
    peers: Any = SimpleNamespace(find=lambda _: asyncio.Event().wait())
    answer: Any = SimpleNamespace(stopped=False, num_tokens=0, flush=lambda: "")
    thread = ModelThread(1)
    try:
        session = EdgeSession(
            SessionContext(model, thread, peers, 1.0, False, PathMemory()),
            answer, MagicMock(), MagicMock(),
        )  # fmt: skip
        session.begin(spec(), edge.Control(0.1, 4, 0.1, ttl_ms=1e3), (), 1)
        await asyncio.sleep(0)  # it begins to look for a cloud worker
        if reason is not None:
            session.handle(Ended(reason))
        session.close()
        session.close()
        await thread.call(lambda: None)
        assert given_back == [(cache, "model")]
    finally:
        thread.close()
