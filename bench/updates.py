"""The controller's updates of threshold and window, as they are published.

The controller publishes a `ControlUpdate` for a session after each of its windows, and repeats the
latest every second, since PUB drops messages for late subscribers. This module subscribes to that
socket as an edge worker does, drops the repeats, and turns an update into a line of text. It only
listens: it cannot slow down or change an answer.

    async with subscribed("redis://127.0.0.1:6379/0") as updates:
        request_id = await client.submit("Why is the sky blue?", method="e2sci")
        async for update in updates.of(session_id(request_id)):
            print(update.threshold, update.window, update.credit)
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bus.protocol.errors import ConfigurationError
from bus.protocol.messages import ControlUpdate, Message
from bus.runtime.worker import ControllerLink
from bus.settings import BusSettings
from bus.store import Role, Store
from bus.transport.sockets import Sockets

__all__ = ["Updates", "describe", "subscribed"]


class Updates:
    """What was published since the subscription, by session."""

    def __init__(self) -> None:
        self._queues: defaultdict[str, asyncio.Queue[ControlUpdate]] = defaultdict(asyncio.Queue)
        self._newest: dict[str, tuple[int, int]] = {}

    def receive(self, message: Message) -> None:
        """Take a message of the controller; repeats and older ones are dropped."""
        if not isinstance(message, ControlUpdate):
            return
        number = (message.term, message.version)
        if number > self._newest.get(message.session, (-1, -1)):
            self._newest[message.session] = number
            self._queues[message.session].put_nowait(message)

    async def of(self, session: str) -> AsyncIterator[ControlUpdate]:
        """The updates of one session, each once and in order, until cancelled."""
        queue = self._queues[session]
        while True:
            yield await queue.get()


def describe(before: ControlUpdate | None, update: ControlUpdate) -> str | None:
    """A line on what `update` changes: threshold in nats, window in tokens, credit in 0 … 1.

    None where threshold and window are as `before`. The first update of a session, with `before`
    None, says what the session starts with.
    """
    if before is None:
        threshold, window = f"{update.threshold:.3f}", f"{update.window}"
    elif (before.threshold, before.window) == (update.threshold, update.window):
        return None
    else:
        threshold = _change(f"{before.threshold:.3f}", f"{update.threshold:.3f}")
        window = _change(f"{before.window}", f"{update.window}")
    return f"controller: threshold {threshold}, window {window} (credit {update.credit:.2f})"


def _change(before: str, after: str) -> str:
    return after if before == after else f"{before} → {after}"


@asynccontextmanager
async def subscribed(redis_url: str) -> AsyncIterator[Updates]:
    """Subscribe to the updates for every edge worker that is registered now.

    The controller is found through the registry, also after a restart. What it published before
    the connection stood is lost; the state of each live session is repeated every second.

    Raises:
        ConfigurationError: no edge worker is registered.
        StoreUnavailableError: Redis does not answer.
    """
    settings = BusSettings.load(redis_url=redis_url)
    store = await Store.connect(settings)
    sockets = Sockets(settings)
    following: list[asyncio.Task[None]] = []
    try:
        edges = await store.registry.workers(Role.EDGE)
        if not edges:
            raise ConfigurationError("no edge worker is running; start one with `e2sci up`")
        updates = Updates()
        for edge in edges:
            link = ControllerLink(store, sockets, edge.worker_id, updates.receive)
            following.append(asyncio.create_task(link.follow_forever()))
        yield updates
    finally:
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        sockets.close()
        await store.close()
