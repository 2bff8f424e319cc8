"""Cloud and middle workers as an edge sees them: found in the registry, connected once, shared by
sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from bus.protocol.codec import AnyMessage
from bus.protocol.errors import ConfigurationError, RequestError, TokenizerMismatchError
from bus.protocol.messages import Message
from bus.store import Role, Store, WorkerRecord
from bus.transport.sockets import Listener, Outbox, Sockets
from decoding.methods import how_to_get

log = logging.getLogger(__name__)

SEEK_INTERVAL_S = 0.25
_MODELS = {Role.CLOUD: "target", Role.MIDDLE: "model"}

Receive = Callable[["Peer", AnyMessage, int], None]
Failed = Callable[["Peer", AnyMessage, Exception], None]


class Peer:
    """One cloud or middle worker: its record and the sockets to it.

    Attributes:
        num_holders: sessions that use it. Its sockets stay open while there are some, whatever
            the registry says: a heartbeat may come late.
        silenced: its listener has failed; whoever holds it must find a worker again.
    """

    def __init__(self, record: WorkerRecord, outbox: Outbox, listener: Listener) -> None:
        self.record = record
        self.num_holders = 0
        self.silenced = False
        self._outbox = outbox
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    def send(self, message: Message) -> int:
        """Queue a message; returns its size in bytes."""
        return self._outbox.send(message)

    def listen(
        self, receive: Receive, failed: Failed, silenced: Callable[[Peer, str], None]
    ) -> None:
        """Hand this worker, every message of it, and its size to `receive`.

        Args:
            failed: called with this worker, a message that `receive` could not handle, and the
                reason.
            silenced: called with the reason if the listener itself fails.
        """

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                self.silenced = True
                silenced(self, str(task.exception()))

        self._task = asyncio.create_task(
            self._listener.deliver(partial(receive, self), partial(failed, self))
        )
        self._task.add_done_callback(ended)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._outbox.close()
        self._listener.close()


class Peers:
    """Finds cloud or middle workers that share the draft's tokenizer, and whose tokens it all has.

    Args:
        digest, vocab_size: of the draft.
        receive, failed: as in `Peer.listen`.
    """

    def __init__(
        self,
        store: Store,
        sockets: Sockets,
        edge: str,
        digest: str,
        vocab_size: int,
        receive: Receive,
        failed: Failed,
    ) -> None:
        self._store = store
        self._sockets = sockets
        self._edge = edge
        self._digest = digest
        self._vocab_size = vocab_size
        self._receive = receive
        self._failed = failed
        self._peers: dict[str, Peer] = {}  # by boot: a restarted worker is another peer
        self._unreachable: set[str] = set()  # boots whose addresses are none
        self._waiting: dict[int, asyncio.Event] = {}  # for a place; by the session's turn

    async def find(
        self,
        mismatch_wait_s: float,
        probe: str = "",
        left: str = "",
        pause_s: float = 0.0,
        turn: int = 0,
        role: Role = Role.CLOUD,
        speculator: str = "",
    ) -> Peer:
        """The best fitting worker, held for the caller (`let_go`); waits while there is none.

        Of those with room it is one of the same digest, then the least loaded.

        Args:
            probe: probe digest of the target that gave the answer's tokens so far; empty if there
                are none or nobody knows.
            left: boot of the worker that the session comes from, which it goes back to last.
            pause_s: where only that one or full ones are there, wait so long before asking again,
                or until a session of this edge has ended and it is our turn.
            turn: of those who wait the lowest comes first.
            role: of the worker. speculator: that it must have; empty: none.

        Raises:
            TokenizerMismatchError: workers are there, but for `mismatch_wait_s` none that fits.
            RequestError: some fit, but for `mismatch_wait_s` none with that speculator.
            StoreUnavailableError: the registry cannot be read.
        """
        waited_s, said = 0.0, False
        while True:
            everyone = await self._store.registry.workers()
            live = [r for r in everyone if r.role is role and r.boot not in self._unreachable]
            akin = [r for r in live if self._fits(r)]
            fitting = [r for r in akin if not speculator or speculator in r.speculators]
            if fitting:
                best = min(fitting, key=lambda r: _place(r, probe, left))
                if pause_s > 0 and (best.boot == left or _is_full(best)):
                    await self._vacancy(turn, pause_s)
                    pause_s = 0.0
                    continue
                peer = self._try_connect(best, everyone)
                if peer is None:
                    continue
                if probe not in ("", best.probe_digest):
                    self._changes(best, probe)
                peer.num_holders += 1
                return peer
            waited_s += SEEK_INTERVAL_S
            if akin and waited_s >= mismatch_wait_s:
                raise _no_speculator(akin, speculator)
            if live and waited_s >= mismatch_wait_s:
                raise self._mismatch(live, role)
            if not said:
                log.info("no fitting %s worker is registered; waiting for one", role)
                said = True
            await asyncio.sleep(SEEK_INTERVAL_S)

    def _fits(self, record: WorkerRecord) -> bool:
        """Whether the draft can read whatever this worker's target writes."""
        return record.tokenizer_digest == self._digest and record.vocab_size <= self._vocab_size

    def _mismatch(self, live: list[WorkerRecord], role: Role) -> TokenizerMismatchError:
        """Why none of the live workers fits."""
        names = ", ".join(f"{r.worker_id} ({r.model})" for r in live)
        same = [r.vocab_size for r in live if r.tokenizer_digest == self._digest]
        if same:
            return TokenizerMismatchError(
                f"the draft knows {self._vocab_size} tokens, a target of its tokenizer writes "
                f"{min(same)}; live ones: {names}. Use a draft with a row for every token"
            )
        return TokenizerMismatchError(
            f"no {role} worker shares the draft's tokenizer; live ones: {names}. "
            f"Start a {role} worker with a {_MODELS[role]} of the draft's family"
        )

    def let_go(self, peer: Peer) -> None:
        """The session that found it does not need it any more."""
        peer.num_holders -= 1

    def vacated(self) -> None:
        """A session has given its place up: who has waited longest asks for it."""
        if self._waiting:
            self._waiting[min(self._waiting)].set()

    async def _vacancy(self, turn: int, limit_s: float) -> None:
        told = self._waiting[turn] = asyncio.Event()
        try:
            async with asyncio.timeout(limit_s):
                await told.wait()
        except TimeoutError:
            pass
        finally:
            del self._waiting[turn]

    async def is_gone(self, peer: Peer) -> bool:
        """Whether the worker has left the registry or another process has taken its place."""
        if peer.silenced:
            return True
        live = await self._store.registry.workers(role=peer.record.role)
        return all(record.boot != peer.record.boot for record in live)

    def _changes(self, record: WorkerRecord, probe: str) -> None:
        """An answer goes on at a target that computes something else."""
        self._sockets.counters["digest_changes"] += 1
        log.warning(
            "no target of probe %s has room; an answer goes on at %s (probe %s), and its text may "
            "differ from here on",
            probe[:8], record.worker_id, record.probe_digest[:8] or "unknown",
        )  # fmt: skip

    def _try_connect(self, record: WorkerRecord, live: list[WorkerRecord]) -> Peer | None:
        """The worker; None, and passed over from now on, where its addresses are none."""
        try:
            return self._connect(record, live)
        except ConfigurationError as error:
            log.warning(
                "%s worker %s: %s; looking for another", record.role, record.worker_id, error
            )
            self._unreachable.add(record.boot)
            return None

    def _connect(self, record: WorkerRecord, live: list[WorkerRecord]) -> Peer:
        boots = {r.boot for r in live}
        for boot, peer in list(self._peers.items()):
            if peer.silenced or (boot not in boots and not peer.num_holders):
                self._peers.pop(boot).close()
        if record.boot not in self._peers:
            where = record.endpoints.get("windows")
            log.info("%s worker %s at %s", record.role, record.worker_id, where)
            peer = Peer(
                record,
                self._sockets.outbox(record.endpoints.get("windows", "")),
                self._sockets.listener(record.endpoints.get("feedback", ""), self._edge),
            )
            peer.listen(self._receive, self._failed, self._silenced)
            self._peers[record.boot] = peer
        return self._peers[record.boot]

    def _silenced(self, peer: Peer, why: str) -> None:
        self._sockets.counters["failed_listeners"] += 1
        record = peer.record
        log.error("%s worker %s: its listener failed: %s", record.role, record.worker_id, why)

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()


def _no_speculator(akin: list[WorkerRecord], speculator: str) -> RequestError:
    """Why none of the workers that fit otherwise can serve the method."""
    names = ", ".join(f"{r.worker_id} ({r.model})" for r in akin)
    return RequestError(
        f"no cloud worker has the speculator {speculator!r}; live ones: {names}. Choose another "
        f"method, or {how_to_get(speculator)}"
    )


def _place(record: WorkerRecord, probe: str, left: str) -> tuple[bool, bool, bool, int, str]:
    """Sort key of the workers that fit a session; arguments as in `Peers.find`."""
    differs = probe not in ("", record.probe_digest)
    return record.boot == left, _is_full(record), differs, record.load, record.worker_id


def _is_full(record: WorkerRecord) -> bool:
    return 0 < record.capacity <= record.load
