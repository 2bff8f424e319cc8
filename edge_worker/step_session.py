"""One prompt answered in steps: runs the effects of `decoding.steps` in order.

To the worker it is what `EdgeSession` is. The draft writes on the model thread; each step of the
target's own is a session inside this one, so that the cloud worker runs them together, and a cloud
worker that dies is left as any session leaves it. Steps reach the user whole: whoever takes the
prompt over goes on where a step begins, and gets the same text.
"""

from __future__ import annotations

import asyncio
import logging

from bus.protocol.errors import E2SCIError, ImpossibleEventError, StoreUnavailableError
from bus.protocol.messages import FinishReason, Outcome
from decoding import edge, steps
from decoding.edge_events import Commit, Ended, Event, WindowJudged
from decoding.steps import (
    CommitStep,
    DraftStep,
    DropSteps,
    Effect,
    Finish,
    SeekPeer,
    Started,
    StepDrafted,
    StepWritten,
    StopMatched,
    WriteStep,
)
from decoding.story import Story
from edge_worker.answer import AnswerOutput
from edge_worker.context import SessionContext
from edge_worker.peers import Peer
from edge_worker.session import RETRY_S
from edge_worker.specs import EdgeModel
from edge_worker.step_drafting import StepDrafting
from edge_worker.step_writing import StepWriting
from edge_worker.text import StepText
from edge_worker.usage import UsageMeter
from engines.thread import now_ms

log = logging.getLogger(__name__)


class StepSession:
    """State machine, the draft's work and the target's sessions of one prompt.

    Any exception ends only this prompt, with an error that its user can read.

    Attributes:
        story: what happened to it last.

    Args:
        output: takes what is decided. meter: counts what it costs, the same as the output's.
        model: the draft.
    """

    def __init__(
        self, context: SessionContext, output: AnswerOutput, meter: UsageMeter, model: EdgeModel
    ) -> None:
        self._context = context
        self._output = output
        self._meter = meter
        self._tokenizer = model.tokenizer
        self._drafting = StepDrafting(model, context.thread, model.tokenizer, self)
        self._writing: dict[int, StepWriting] = {}
        self._draft_ms: dict[int, float] = {}
        self._seeking: asyncio.Task[None] | None = None
        self._peer: Peer | None = None  # that wrote the latest step
        self.state: steps.StepsState
        self.story = Story()

    def begin(
        self,
        spec: edge.SessionSpec,
        control: edge.Control,
        committed: tuple[int, ...],
        incarnation: int,
        last_incarnation: int = edge.MAX_INCARNATION,
    ) -> None:
        """As `EdgeSession.begin`; tokens that were streamed are whole steps."""
        rule = spec.method.steps
        assert rule is not None
        self._spec, self._control = spec, control
        self._incarnations = incarnation, last_incarnation
        self._drafting.open(spec, self._failed)
        self.state, effects = steps.begin(rule, spec.prompt, spec.max_new_tokens, committed)
        self.story.begun(now_ms(), f"resumes the request after {len(committed)} tokens")
        self._run(effects)

    def handle(self, event: Event | steps.Event) -> None:
        """One event in, its effects out; those of `EdgeSession` that are not for steps change
        nothing. Raises nothing."""
        try:
            if isinstance(event, steps.Event):
                self._advance(event)
        except ImpossibleEventError as error:
            self._context.counters["impossible_events"] += 1
            lines = "\n".join(self.story.lines())
            log.error("session %s: %s; ignored. Before:\n%s", self._spec.session, error, lines)
        except Exception as error:  # noqa: BLE001 - any exception ends only this prompt
            self._failed(error)

    @property
    def finished(self) -> bool:
        return self.state.finished

    def close(self) -> None:
        """Stop drafting, writing and waiting."""
        self.handle(Ended(FinishReason.CANCELLED))
        self._drafting.close()
        if self._seeking is not None:
            self._seeking.cancel()

    def _advance(self, event: steps.Event) -> None:
        before = self.state.name
        self.state, effects = steps.step(self.state, event)
        self.story.told(now_ms(), event, effects, before, self.state.name)
        self._run(effects)

    def _failed(self, error: Exception) -> None:
        """End the answer with an error its author can read."""
        why = str(error)
        if not isinstance(error, E2SCIError):
            log.error("session %s", self._spec.session, exc_info=error)
            why = f"the draft failed: {error}"
        self._context.counters["failed_sessions"] += 1
        self.writing_failed(why)

    # --- effects --------------------------------------------------------------------------

    def _run(self, effects: tuple[Effect, ...]) -> None:
        """Messages first; a turn of the loop later what is decided, as text takes time."""
        decided: list[CommitStep | Finish] = []
        for effect in effects:
            match effect:
                case SeekPeer():
                    self._seeking = asyncio.create_task(self._seek())
                case WriteStep():
                    self._write(effect)
                case DraftStep():
                    assert self.state.eos is not None
                    self._drafting.draft(effect, self.state.eos)
                case DropSteps(first):
                    self._drop(first)
                case Finish():
                    self._drop(0)
                    decided.append(effect)
                case CommitStep():
                    decided.append(effect)
        if decided:
            in_flight = sum(len(p.drafted.tokens) for p in self.state.pending if p.drafted)
            asyncio.get_running_loop().call_soon(
                self._notify_guarded, decided, self._peer, in_flight
            )

    async def _seek(self) -> None:
        """Any worker that fits knows the target's end tokens."""
        peers, turn = self._context.peers, next(self._context.turns)
        while True:
            try:
                peer = await peers.find(
                    self._context.mismatch_wait_s, self._output.probe, turn=turn
                )
            except StoreUnavailableError:
                await asyncio.sleep(RETRY_S)
            except Exception as error:  # noqa: BLE001 - any exception ends only this prompt
                return self._failed(error)
            else:
                peers.let_go(peer)
                return self.handle(Started(frozenset(peer.record.eos_tokens), now_ms()))

    def _write(self, effect: WriteStep) -> None:
        assert self.state.eos is not None
        writing = StepWriting(
            self._context, self._spec, effect, self._tokenizer, self.state.eos, self._meter, self
        )
        self._writing[effect.index] = writing
        writing.begin(self._control, *self._incarnations)

    def _drop(self, first: int) -> None:
        self._drafting.drop(first)
        for index in [index for index in self._writing if index >= first]:
            self._writing.pop(index).close()

    # --- what comes of it -----------------------------------------------------------------

    def wrote(self, index: int, tokens: tuple[int, ...]) -> None:
        """The draft has written tokens: the target's session of this step verifies them."""
        writing = self._writing.get(index)
        if writing is not None:
            writing.drafting.give(tokens)

    def drafted(self, index: int, step: StepText, draft_ms: float) -> None:
        self._draft_ms[index] = draft_ms
        place = next((p for p, each in enumerate(self.state.pending) if each.index == index), 0)
        before = sum(len(p.drafted.tokens) for p in self.state.pending[:place] if p.drafted)
        start = len(self.state.tokens) + before
        self._meter.timeline.opened(index, start, len(step.tokens), now_ms())
        self.handle(StepDrafted(index, step.tokens, step.read()))

    def ran(self, start: int, num_tokens: int, draft_ms: float, ended_ms: float) -> None:
        self._meter.drafted(start, num_tokens, draft_ms, ended_ms)

    def written(self, index: int, step: StepText, peer: Peer | None) -> None:
        writing = self._writing.pop(index, None)
        if writing is None:
            return  # dropped meanwhile
        self._peer = peer
        writing.close()
        self.handle(StepWritten(index, step.tokens, step.read()))

    def writing_failed(self, why: str) -> None:
        self.handle(Ended(FinishReason.ERROR, why))

    # --- what is decided ------------------------------------------------------------------

    def _notify_guarded(
        self, effects: list[CommitStep | Finish], peer: Peer | None, in_flight: int
    ) -> None:
        try:
            for effect in effects:
                self._notify(effect, peer, in_flight)
        except Exception as error:
            log.exception("session %s could not go on", self._spec.session)
            self._output.failed(f"internal error in the edge worker: {error}")
            self.handle(Ended(FinishReason.ERROR))

    def _notify(self, effect: CommitStep | Finish, peer: Peer | None, in_flight: int) -> None:
        """Hand it to the output; a stop string in a step ends the answer."""
        if isinstance(effect, Finish):
            self._output.notify([effect], peer)
            return
        over = self._output.stopped_at is not None
        if over:
            return  # it is after a stop string
        count = len(effect.tokens)
        commit = Commit(effect.start, effect.tokens, (effect.accepted,) * count)
        self._output.notify([commit, self._fact(effect, in_flight)], peer)
        self._meter.stepped(effect.accepted)
        stopped_at = self._output.stopped_at
        if stopped_at is not None and not self.finished:
            self.handle(StopMatched(stopped_at))

    def _fact(self, effect: CommitStep, in_flight: int) -> WindowJudged:
        """The step as telemetry shows it: a window that is accepted as a whole or not at all."""
        count = len(effect.tokens)
        return WindowJudged(
            incarnation=self._incarnations[0] + 1, number=effect.index,
            outcome=Outcome.ACCEPTED if effect.accepted else Outcome.PARTIAL,
            num_drafted=effect.num_drafted, num_accepted=count if effect.accepted else 0,
            num_committed=count, rolled_back=not effect.accepted,
            length=len(self._spec.prompt) + effect.start + count, threshold=0.0,
            window=self._control.window, credit=0.0, budget=0, in_flight=in_flight,
            draft_ms=self._draft_ms.pop(effect.index, 0.0), verify_ms=0.0, queue_ms=0.0,
            pass_tokens=0, rtt_ms=self._meter.rtt_ms, at_ms=now_ms(),
        )  # fmt: skip
