"""Cloud workers as an edge sees them: found in the registry, connected once, shared by sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from bus.protocol.codec import AnyMessage
from bus.protocol.errors import ConfigurationError, TokenizerMismatchError
from bus.protocol.messages import Message
from bus.store import Store, WorkerRecord
from bus.transport.sockets import Listener, Outbox, Sockets

log = logging.getLogger(__name__)

SEEK_INTERVAL_S = 0.25

Receive = Callable[[AnyMessage, int], None]


class Peer:
    """One cloud worker: its record and the sockets to it."""

    def __init__(self, record: WorkerRecord, outbox: Outbox, listener: Listener) -> None:
        self.record = record
        self._outbox = outbox
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    def send(self, message: Message) -> int:
        """Queue a message; returns its size in bytes."""
        return self._outbox.send(message)

    def listen(self, receive: Receive) -> None:
        """Hand every message of this worker, and its size, to `receive`."""
        self._task = asyncio.create_task(self._listener.deliver(receive))

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._outbox.close()
        self._listener.close()


class Peers:
    """Finds cloud workers that share the draft's tokenizer."""

    def __init__(
        self, store: Store, sockets: Sockets, edge: str, digest: str, receive: Receive
    ) -> None:
        self._store = store
        self._sockets = sockets
        self._edge = edge
        self._digest = digest
        self._receive = receive
        self._peers: dict[str, Peer] = {}  # by boot: a restarted worker is another peer
        self._unreachable: set[str] = set()  # boots whose addresses are none

    async def find(self, mismatch_wait_s: float, probe: str = "", left: str = "") -> Peer:
        """The best fitting worker; waits while there is none.

        Of those with room it is one of the same digest, then the least loaded.

        Args:
            probe: probe digest of the target that gave the answer's tokens so far; empty if there
                are none or nobody knows.
            left: boot of the worker that the session comes from, which it goes back to last.

        Raises:
            TokenizerMismatchError: workers are there, but for `mismatch_wait_s` none that fits.
            StoreUnavailableError: the registry cannot be read.
        """
        waited_s, said = 0.0, False
        while True:
            live = await self._store.registry.workers(role="cloud")
            live = [r for r in live if r.boot not in self._unreachable]
            fitting = [r for r in live if r.tokenizer_digest == self._digest]
            if fitting:
                best = min(fitting, key=lambda r: _place(r, probe, left))
                try:
                    peer = self._connect(best, live)
                    if probe not in ("", best.probe_digest):
                        self._changes(best, probe)
                    return peer
                except ConfigurationError as error:
                    log.warning("cloud worker %s: %s; looking for another", best.worker_id, error)
                    self._unreachable.add(best.boot)
                    continue
            waited_s += SEEK_INTERVAL_S
            if live and waited_s >= mismatch_wait_s:
                names = ", ".join(f"{r.worker_id} ({r.model})" for r in live)
                raise TokenizerMismatchError(
                    f"no cloud worker shares the draft's tokenizer; live ones: {names}. "
                    "Start a cloud worker with a target of the draft's family"
                )
            if not said:
                log.info("no fitting cloud worker is registered; waiting for one")
                said = True
            await asyncio.sleep(SEEK_INTERVAL_S)

    async def is_gone(self, peer: Peer) -> bool:
        """Whether the worker has left the registry or another process has taken its place."""
        live = await self._store.registry.workers(role="cloud")
        return all(record.boot != peer.record.boot for record in live)

    def _changes(self, record: WorkerRecord, probe: str) -> None:
        """An answer goes on at a target that computes something else."""
        self._sockets.counters["digest_changes"] += 1
        log.warning(
            "no target of probe %s has room; an answer goes on at %s (probe %s), and its text may "
            "differ from here on",
            probe[:8], record.worker_id, record.probe_digest[:8] or "unknown",
        )  # fmt: skip

    def _connect(self, record: WorkerRecord, live: list[WorkerRecord]) -> Peer:
        boots = {r.boot for r in live}
        for boot in [b for b in self._peers if b not in boots]:
            self._peers.pop(boot).close()
        peer = self._peers.get(record.boot)
        if peer is None:
            log.info("cloud worker %s at %s", record.worker_id, record.endpoints.get("windows"))
            peer = Peer(
                record,
                self._sockets.outbox(record.endpoints.get("windows", "")),
                self._sockets.listener(record.endpoints.get("feedback", ""), self._edge),
            )
            peer.listen(self._receive)
            self._peers[record.boot] = peer
        return peer

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()


def _place(record: WorkerRecord, probe: str, left: str) -> tuple[bool, bool, bool, int, str]:
    """Sort key of the workers that fit a session; arguments as in `Peers.find`."""
    full = 0 < record.capacity <= record.load
    differs = probe not in ("", record.probe_digest)
    return record.boot == left, full, differs, record.load, record.worker_id
