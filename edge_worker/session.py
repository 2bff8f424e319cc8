"""One session in the edge worker's shell: runs the effects of `decoding.edge` in order.

Drafts come from its `Drafting`, results go to its `SessionOutput`: for a request the model thread
and the answer in Redis, off the token path.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from bus.protocol.errors import E2SCIError, ImpossibleEventError, StoreUnavailableError
from bus.protocol.messages import CloseSession, FinishReason, Message
from bus.runtime.logs import log_context
from bus.store import Role
from decoding import edge
from decoding.edge_events import (
    CheckPeer,
    Commit,
    Crop,
    Draft,
    Drafted,
    Effect,
    Ended,
    Event,
    Finish,
    Learn,
    PeerLost,
    SeekPeer,
    Send,
    Started,
    StopMatched,
    WindowJudged,
)
from decoding.engine import DraftedWindow
from decoding.story import Story
from edge_worker.context import SessionContext
from edge_worker.drafting import Drafting, ModelDrafting
from edge_worker.output import DecidedEffect, SessionOutput
from edge_worker.peers import Peer
from engines.thread import now_ms

log = logging.getLogger(__name__)

RETRY_S = 0.5


class EdgeSession:
    """State machine, peer and pending work of one session.

    Any exception of the engine, the tokenizer, a callback or a message ends only this session, with
    an error that its user can read.

    Attributes:
        story: what happened to it last.

    Args:
        output: takes what is decided.
        drafting: answers drafts; None: the worker's drafter, on its model thread.
        role: of the workers that verify for it.
    """

    def __init__(
        self, context: SessionContext, output: SessionOutput, drafting: Drafting | None = None,
        role: Role = Role.CLOUD,
    ) -> None:  # fmt: skip
        self._context = context
        self._output = output
        self._drafting = drafting or ModelDrafting(context.drafter, context.thread)
        self._role = role
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = next(context.turns)
        self._asked: list[Peer] = []  # full ones, which keep a place in their row for us
        self.peer: Peer | None = None
        self.state: edge.EdgeState
        self.story = Story()

    def begin(
        self,
        spec: edge.SessionSpec,
        control: edge.Control,
        committed: tuple[int, ...],
        incarnation: int,
        last_incarnation: int = edge.MAX_INCARNATION,
    ) -> None:
        """Start, or go on from tokens that were already streamed; arguments as in `edge.begin`.

        Raises:
            Exception: what the drafter raises; then there is nothing to close.
        """
        self.state, effects = edge.begin(spec, control, committed, incarnation, last_incarnation)
        self.story.begun(now_ms(), f"resumes the request after {len(committed)} tokens")
        self._drafting.open(spec, self._drafted, self._failed)
        self._context.addresses.add(self)
        self._run(effects)

    def handle(self, event: Event) -> None:
        """One event in, its effects out. Raises nothing."""
        try:
            self._advance(event)
        except ImpossibleEventError as error:
            self._context.counters["impossible_events"] += 1
            self._log_story(f"{error}; ignored")
        except Exception as error:  # noqa: BLE001 - any exception ends only this prompt
            self._failed(error)

    def _advance(self, event: Event) -> None:
        before = self.state.stage
        self.state, effects = edge.step(self.state, event)
        at_ms, after = now_ms(), self.state.stage
        try:
            self._run(effects)
        finally:  # messages first
            self.story.told(at_ms, event, effects, before.name, after.name)
        if isinstance(after, edge.Running) and not isinstance(before, edge.Running):
            self._leave_rows()

    def _log_story(self, why: str) -> None:
        with self._about():
            log.error(
                "session %s: %s. Before:\n%s",
                self.state.spec.session, why, "\n".join(self.story.lines()),
            )  # fmt: skip

    def _about(self) -> AbstractContextManager[None]:
        """Records within are about this session, from whichever callback they come."""
        spec = self.state.spec
        return log_context(spec.traceparent, session=spec.session)

    def received(self, size: int) -> None:
        """Count a message that came for this session, in bytes."""
        self._output.received(size)

    @property
    def finished(self) -> bool:
        return isinstance(self.state.stage, edge.Finished)

    @property
    def handle_there(self) -> int | None:
        """By which the cloud worker knows this session; None where it does not."""
        stage = self.state.stage
        return stage.handle if isinstance(stage, edge.Running) else None

    def close(self) -> None:
        """Stop drafting and waiting; nothing reaches it any more."""
        self.handle(Ended(FinishReason.CANCELLED))
        self._context.addresses.remove(self)
        self._drafting.close()
        for task in self._tasks:
            task.cancel()
        self._leave_rows()
        if self.peer is not None:
            self._context.peers.let_go(self.peer)
            self.peer = None

    def _leave_rows(self) -> None:
        """Workers that were full keep a place in their row no longer."""
        asked, self._asked = self._asked, []
        for peer in asked:
            if peer is not self.peer:
                close = CloseSession(self.state.spec.session, self.state.incarnation, "elsewhere")
                self._output.sent(close, peer.send(close))
            self._context.peers.let_go(peer)

    # --- effects --------------------------------------------------------------------------

    def _run(self, effects: tuple[Effect, ...]) -> None:
        """Run effects: at once what others wait for; a turn of the loop later text and telemetry.

        The draft thread needs the interpreter to begin. Should the text end at a stop string, the
        draft that has begun is interrupted.
        """
        decided: list[DecidedEffect] = []
        for effect in effects:
            match effect:
                case Draft():
                    self._draft(effect)
                case Crop(length):
                    self._drafting.crop(length)
                case Learn():
                    self._drafting.learn(effect)
                case Send(message):
                    self._send(message)
                case SeekPeer():
                    self._start(partial(self._seek, effect))
                case CheckPeer():
                    self._start(self._check_peer)
                case Commit() | WindowJudged() | Finish():
                    decided.append(effect)
        if decided:
            asyncio.get_running_loop().call_soon(self._notify_guarded, decided)

    def _notify_guarded(self, effects: list[DecidedEffect]) -> None:
        try:
            self._notify(effects)
        except Exception as error:  # noqa: BLE001 - as in `handle`
            self._failed(error)

    def _notify(self, effects: list[DecidedEffect]) -> None:
        """Hand what one step has decided to the output; a stop string there ends the session."""
        self._output.notify(effects, self.peer)
        if self.peer is not None and any(isinstance(effect, Finish) for effect in effects):
            worker, method = self.peer.record.worker_id, self.state.spec.method.name
            self._context.memory.keep(worker, method, self.state.measures)
        stopped_at = self._output.stopped_at
        if stopped_at is not None and not self.finished:
            self.handle(StopMatched(stopped_at))

    def _send(self, message: Message) -> None:
        if self.peer is None:
            return
        self._output.sent(message, self.peer.send(message))
        if isinstance(message, CloseSession):
            self._context.peers.vacated()

    # --- work that waits ------------------------------------------------------------------

    def _start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - any exception ends only this prompt
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """End the answer with an error its author can read; should that fail too, with no more
        than the error."""
        if isinstance(error, E2SCIError):
            why = str(error)
        else:
            with self._about():
                log.error("session %s", self.state.spec.session, exc_info=error)
            why = f"the draft failed: {error}"
        self._context.counters["failed_sessions"] += 1
        if self.finished:
            self._output.failed(why)
            return
        try:
            self._advance(Ended(FinishReason.ERROR, why))
        except Exception:
            with self._about():
                log.exception("session %s could not end in order", self.state.spec.session)
            self._output.failed(why)

    async def _seek(self, effect: SeekPeer) -> None:
        peers, old = self._context.peers, self.peer
        left = ""
        if old is not None:
            with self._about():
                log.info(
                    "session %s looks for a %s worker: %s",
                    self.state.spec.session, self._role, effect.why,
                )  # fmt: skip
            left = old.record.boot if effect.leave else ""
        pause_s = effect.pause_ms / 1e3 * random.uniform(0.5, 1.0)  # not all edges at once
        if not effect.leave:
            await asyncio.sleep(pause_s)
            pause_s = 0.0
        while not self.finished:
            try:
                self.peer = await peers.find(
                    self._context.mismatch_wait_s,
                    self._output.probe,
                    left,
                    pause_s,
                    self._turn,
                    self._role,
                    self.state.spec.method.speculator,
                )
            except StoreUnavailableError:
                await asyncio.sleep(RETRY_S)
                continue
            if old is self.peer or old in self._asked:
                peers.let_go(old)
            elif old is not None:
                self._asked.append(old)
            record, method = self.peer.record, self.state.spec.method.name
            measures = self._context.memory.recall(record.worker_id, method)
            self.handle(Started(frozenset(record.eos_tokens), now_ms(), measures))
            return

    async def _check_peer(self) -> None:
        peer = self.peer
        if peer is None:
            return
        try:
            gone = await self._context.peers.is_gone(peer)
        except StoreUnavailableError:
            return
        if gone and peer is self.peer:
            self.handle(PeerLost(now_ms()))

    # --- drafting -------------------------------------------------------------------------

    def _draft(self, effect: Draft) -> None:
        self._drafting.draft(
            effect,
            self.state.eos,
            lambda: self.state.job is None or self.state.job.number != effect.job,
        )

    def _drafted(self, job: int, window: DraftedWindow) -> None:
        """Interrupted ones are counted too, though the machine will not hear of their tokens."""
        at_ms = now_ms()
        self.handle(
            Drafted(
                job, window.start, window.num_cached, window.tokens, window.q_ids, window.q_probs,
                window.draft_ms, at_ms,
            )
        )  # fmt: skip
        self._output.drafted(window.start, len(window.tokens), window.draft_ms, at_ms)
