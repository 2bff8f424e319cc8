"""One prompt in the edge worker's shell: runs the effects of `decoding.edge` in order.

Draft work goes to the worker's one model thread, a chunk of prefill or one window at a time, so
sessions take turns; a crop rides along with the next job. Redis is written by `ResultWriter`,
off the token path.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from msgspec.structs import replace

from bus.protocol.errors import E2SCIError, ImpossibleEventError, StoreUnavailableError
from bus.protocol.messages import CloseSession, FinishReason, Message
from bus.store import TelemetryEntry, Usage
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
from edge_worker.peers import Peer
from edge_worker.text import AnswerText
from edge_worker.usage import UsageMeter, within
from edge_worker.writer import Piece, ResultWriter
from engines.thread import now_ms

log = logging.getLogger(__name__)

RETRY_S = 0.5


class EdgeSession:
    """State machine, cache, text and pending jobs of one prompt.

    Any exception of the engine, the tokenizer, a callback or a message ends only this session, with
    an error that its user can read.

    Attributes:
        story: what happened to it last.

    Args:
        answer: the answer's text so far (a session taken over has some already).
        meter: counts what `usage` reports.
        writer: stores pieces and the end.
    """

    def __init__(
        self, context: SessionContext, answer: AnswerText, meter: UsageMeter, writer: ResultWriter
    ) -> None:
        self._context = context
        self._answer = answer
        self._meter = meter
        self._writer = writer
        self._turns = context.thread.turns(self._failed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._crop_to: int | None = None
        self._pieces: list[Piece] = []
        self._committed: Commit | None = None  # what of the latest is not in a piece yet,
        self._texts: list[str] = []  # and the text of each of its tokens
        self._cache: Any = None
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
        self._cache = self._context.drafter.open(spec.sampling, spec.prompt)
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
        log.error(
            "session %s: %s. Before:\n%s",
            self.state.spec.session, why, "\n".join(self.story.lines()),
        )  # fmt: skip

    def received(self, size: int) -> None:
        """Count a message that came for this session, in bytes."""
        self._meter.bytes_down += size

    @property
    def finished(self) -> bool:
        return isinstance(self.state.stage, edge.Finished)

    @property
    def handle_there(self) -> int | None:
        """By which the cloud worker knows this session; None where it does not."""
        stage = self.state.stage
        return stage.handle if isinstance(stage, edge.Running) else None

    def close(self) -> None:
        """Stop drafting and waiting; a window that is being drafted ends at its next token. The
        cache then goes to the model's prefix cache, on the model thread."""
        self.handle(Ended(FinishReason.CANCELLED))
        self._turns.close(partial(self._context.drafter.close, self._cache))
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
                self._meter.bytes_up += peer.send(close)
            self._context.peers.let_go(peer)

    # --- effects --------------------------------------------------------------------------

    def _run(self, effects: tuple[Effect, ...]) -> None:
        """Run effects: at once what others wait for; a turn of the loop later text and telemetry.

        The draft thread needs the interpreter to begin. Should the text end at a stop string, the
        draft that has begun is interrupted.
        """
        told: list[Commit | WindowJudged | Finish] = []
        for effect in effects:
            match effect:
                case Draft():
                    self._draft(effect)
                case Crop(length):
                    pending = self._crop_to
                    self._crop_to = length if pending is None else min(pending, length)
                case Send(message):
                    self._send(message)
                case SeekPeer():
                    self._start(partial(self._seek, effect))
                case CheckPeer():
                    self._start(self._check_peer)
                case Commit() | WindowJudged() | Finish():
                    told.append(effect)
        if told:
            asyncio.get_running_loop().call_soon(self._tell_guarded, told)

    def _tell_guarded(self, effects: list[Commit | WindowJudged | Finish]) -> None:
        try:
            self._tell(effects)
        except Exception as error:  # noqa: BLE001 - as in `handle`
            self._failed(error)

    def _tell(self, effects: list[Commit | WindowJudged | Finish]) -> None:
        """Hand what one step has decided to the writer, a piece for each window."""
        over = self._answer.stopped  # what was judged after a stop string is not the user's
        for effect in effects:
            match effect:
                case Commit() if not over:
                    self._commit(effect)
                case WindowJudged() if not over:
                    self._judged(effect)
                case Finish(reason, error):
                    self._finish(FinishReason.STOP if self._answer.stopped else reason, error)
                case _:
                    pass
        self._write_pieces()
        if self._answer.stopped and not self.finished:
            self.handle(StopMatched(self._answer.num_tokens))

    def _commit(self, effect: Commit) -> None:
        """Turn tokens into text, no further than a stop string."""
        texts = self._answer.push_each(effect.tokens)
        kept = len(texts)
        self._meter.committed(kept, None if self.peer is None else self.peer.record)
        self._committed = replace(
            effect, tokens=effect.tokens[:kept], accepted=effect.accepted[:kept]
        )
        self._texts = texts

    def _judged(self, effect: WindowJudged) -> None:
        """What a window has brought, of the text just committed."""
        effect = within(effect, len(self._texts))
        count, committed, texts = effect.num_committed, self._committed, self._texts
        if committed is None or not count:
            return  # a stop string came before it
        self._meter.judged(effect)
        self._pieces.append(
            Piece(
                committed.start, committed.tokens[:count], committed.accepted[:count],
                "".join(texts[:count]), tuple(map(len, texts[:count])),
                self._meter.entry(effect, self.peer), self._meter.probe,
            )
        )  # fmt: skip
        self._committed = replace(
            committed, start=committed.start + count, tokens=committed.tokens[count:],
            accepted=committed.accepted[count:],
        )  # fmt: skip
        self._texts = texts[count:]

    def _finish(self, reason: FinishReason, error: str) -> None:
        rest = "" if self._answer.stopped else self._answer.flush()
        if self._pieces:
            self._pieces[-1] = self._pieces[-1].with_text(rest)
        elif rest:
            self._pieces.append(Piece(self._answer.num_tokens, (), (), rest))
        self._write_pieces()
        entries: list[TelemetryEntry] = [
            *self._meter.rest(self.peer), self._meter.closing(reason),
        ]  # fmt: skip
        if self._context.timelines:
            entries.append(self._meter.timeline_entry())
        self._writer.end(reason, error, self._meter.usage(), *entries)
        if self.peer is not None:
            spec, cloud = self.state.spec, self.peer.record.worker_id
            self._context.memory.keep(cloud, spec.method.name, self.state.measures)

    def _write_pieces(self) -> None:
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            self._writer.put(piece)

    def _send(self, message: Message) -> None:
        if self.peer is None:
            return
        self._meter.sent(message, self.peer.send(message))
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
            log.error("session %s", self.state.spec.session, exc_info=error)
            why = f"the draft failed: {error}"
        self._context.counters["failed_sessions"] += 1
        if self.finished:
            self._writer.end(FinishReason.ERROR, why, Usage())
            return
        try:
            self._advance(Ended(FinishReason.ERROR, why))
        except Exception:
            log.exception("session %s could not end in order", self.state.spec.session)
            self._writer.end(FinishReason.ERROR, why, Usage())

    async def _seek(self, effect: SeekPeer) -> None:
        peers, old = self._context.peers, self.peer
        left = ""
        if old is not None:
            log.info("session %s looks for a cloud worker: %s", self.state.spec.session, effect.why)
            left = old.record.boot if effect.leave else ""
        pause_s = effect.pause_ms / 1e3 * random.uniform(0.5, 1.0)  # not all edges at once
        if not effect.leave:
            await asyncio.sleep(pause_s)
            pause_s = 0.0
        while not self.finished:
            try:
                self.peer = await peers.find(
                    self._context.mismatch_wait_s, self._meter.probe, left, pause_s, self._turn
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

    def _take_crop(self) -> int | None:
        crop_to, self._crop_to = self._crop_to, None
        return crop_to

    def _draft(self, effect: Draft) -> None:
        """A long feed (a prompt) in chunks, so that other sessions get turns between them."""
        feed, crop_to = self._turns.prefill(effect.feed, self._take_crop(), self._prefill)
        self._turns.submit(
            partial(self._window, effect, feed, crop_to), partial(self._drafted, effect.job)
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
        self._meter.drafted(window.start, len(window.tokens), window.draft_ms, at_ms)

    # --- on the model thread --------------------------------------------------------------

    def _prefill(self, tokens: tuple[int, ...], crop_to: int | None) -> None:
        self._crop(crop_to)
        self._context.drafter.prefill(self._cache, tokens)

    def _window(self, effect: Draft, feed: tuple[int, ...], crop_to: int | None) -> DraftedWindow:
        """Roll the cache back and draft; both are the model's time."""
        began_ms = now_ms()
        self._crop(crop_to)
        window = self._context.drafter.draft(
            self._cache, feed, effect.count, self.state.eos,
            stop=lambda: self.state.job is None or self.state.job.number != effect.job,
        )  # fmt: skip
        return replace(window, draft_ms=now_ms() - began_ms)

    def _crop(self, crop_to: int | None) -> None:
        if crop_to is not None:
            drafter = self._context.drafter
            drafter.keep(self._cache, min(crop_to, drafter.length(self._cache)))
