"""Records as workers write them, and a feed on the test's own keys."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from bus.protocol.requests import new_request, session_id
from bus.settings import BusSettings
from bus.store import (
    Claim,
    Role,
    SessionEntry,
    SessionRecord,
    Store,
    Usage,
    WindowEntry,
    WorkerRecord,
)
from dashboard.data import Feed

AT_MS = 1_700_000_000_000


def window(request: str, **values: Any) -> WindowEntry:
    """A window of four drafted tokens, three of them accepted, on edge-1 and cloud-1."""
    defaults: dict[str, Any] = {
        "at_ms": AT_MS,
        "request": request,
        "session": session_id(request),
        "client": "alice",
        "edge": "edge-1",
        "cloud": "cloud-1",
        "method": "sd",
        "incarnation": 1,
        "number": 1,
        "outcome": "partial",
        "num_drafted": 4,
        "num_accepted": 3,
        "num_committed": 4,
        "rollback": True,
        "threshold": 0.15,
        "window": 4,
        "credit": 0.7,
        "draft_ms": 20.0,
        "verify_ms": 40.0,
        "queue_ms": 1.0,
        "rtt_ms": 3.0,
        "bytes_up": 1200,
        "bytes_down": 60,
    }
    return WindowEntry(**{**defaults, **values})


def ended(request: str, **usage: Any) -> SessionEntry:
    """The end of a request."""
    return SessionEntry(
        at_ms=AT_MS,
        request=request,
        session=session_id(request),
        client="alice",
        edge="edge-1",
        cloud="cloud-1",
        method="sd",
        finish_reason="length",
        usage=Usage(**usage),
    )


def worker(worker_id: str, role: Role = Role.EDGE, **values: Any) -> WorkerRecord:
    """A worker's record; `expires_at` is set when it beats."""
    return WorkerRecord(worker_id=worker_id, role=role, boot="boot", **values)


def control(request: str, **values: Any) -> SessionRecord:
    """What the controller has set for a request's session."""
    defaults: dict[str, Any] = {
        "session": session_id(request),
        "client": "alice",
        "edge": "edge-1",
        "cloud": "cloud-2",
        "method": "sd",
        "term": 1,
        "version": 1,
        "threshold": 0.15,
        "window": 6,
        "credit": 0.8,
        "credit_delta": 0.0,
        "updated_at": 0.0,
    }
    return SessionRecord(**{**defaults, **values})


async def run_one_window(store: Store, edge: str = "edge-1") -> Claim:
    """Submit a prompt, let `edge` take it up and commit one window."""
    await store.queue.submit(new_request("Why is the sky blue?", client="alice"))
    claim = await store.queue.take(edge, block_ms=1000)
    assert claim is not None
    entry = window(claim.request_id, edge=edge)
    await store.commit_window(claim, 0, (1, 2, 3, 4), (True, True, True, False), "text", entry)
    return claim


@pytest.fixture
async def feed(bus_settings: BusSettings) -> AsyncIterator[Feed]:
    feed = Feed.connect(bus_settings)
    yield feed
    feed.close()
