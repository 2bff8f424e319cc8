"""One session on a virtual clock: the real state machines, and shells that only pass time.

Temperature 0 and no models: the target's answer is known, and at each of its positions whether the
draft would have written the same, and what its second choice was. What a drafted token after a
wrong one is does not matter, since it falls with it. The shells do as the real ones: one draft at a
time, which looks between two tokens whether it is still wanted; one pass at a time, which takes in
what has come by then. However much text a draft reads before its first token, its steps take the
same time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from bench.simulate.cores import Clock, Core
from bench.simulate.device import Device
from bench.simulate.target import CONTEXT_LENGTH, VOCAB_SIZE, KnownTarget, Positions
from bus.protocol.arrays import Float16Array, Int32Array
from bus.protocol.messages import (
    Ack,
    CloseSession,
    DraftWindow,
    Feedback,
    Message,
    OpenSession,
    SessionReady,
)
from decoding import cloud, cloud_events, edge, edge_events
from decoding.engine import Segment
from decoding.methods import Method
from decoding.pacing import Measures
from decoding.passes import SessionPass, run_pass
from decoding.sampling import SamplingParams
from edge_worker.timeline import Timeline
from engines.second_choices import Choice, choice_at

_WRONG, _OTHER = 1, -1
_WINDOW = 4  # the controller's, where a method asks for it
_TICK_MS = 50.0
_LIMITS = cloud.Limits(VOCAB_SIZE, CONTEXT_LENGTH, threshold_min=0.0, threshold_max=0.0)
_PROMPT = (0, 0, 0)
"""Long enough that the edge knows a draft that begins by reading it for no measure of a step."""


@dataclass(slots=True)
class Outcome:
    """What a simulated session came to.

    Attributes:
        pieces: (time in ms, tokens) of each commit. timeline: what each side did when.
        measures: what the edge has learnt, for the next session.
        passes: how many the target has run, prompt excluded.
    """

    pieces: list[tuple[float, int]]
    timeline: Timeline
    measures: Measures
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    passes: int = 0


@dataclass(frozen=True, slots=True)
class Trouble:
    """What goes wrong, from `begin_ms` to `end_ms` of the session.

    Attributes:
        paused: the edge does nothing, and what has come to it waits; else the link loses whatever
            is sent.
    """

    begin_ms: float
    end_ms: float
    paused: bool

    def covers(self, now_ms: float) -> bool:
        return self.begin_ms <= now_ms < self.end_ms


class SimulatedSession:
    """An edge and a cloud with nothing else to do.

    Args:
        agrees: for each token of the answer, whether the draft would have written it.
        rtt_ms: of the link, half of it each way.
        recalled: what an earlier session has learnt, or None.
        drafts: whether the edge has anything to draft with; else it is a thin client.
        trouble: a pause or an outage, or None.
        seed: of the draft's second choices.
    """

    def __init__(
        self,
        method: Method,
        agrees: tuple[bool, ...],
        rtt_ms: float,
        device: Device,
        recalled: Measures | None = None,
        drafts: bool = True,
        trouble: Trouble | None = None,
        seed: int = 0,
    ) -> None:
        self._clock = Clock()
        self._agrees, self._device, self._recalled = agrees, device, recalled
        self._trouble, self._seed = trouble, seed
        self._one_way_ms = (rtt_ms + device.message_ms) / 2
        self._edge_core = Core(self._clock)
        self._cloud_core = Core(self._clock)
        self._edge_core.beside(self._cloud_core)
        self._method = method
        self._cloud: cloud.CloudState | None = None
        self._handles = itertools.count(1)
        self._target = KnownTarget(self._target_token)
        self._cache = self._target.open(SamplingParams())
        self._draft_queue: list[tuple[edge_events.Draft, int]] = []
        self._prompt_left_ms = device.step_prompt_ms
        self._finished = False
        self._outcome = Outcome([], Timeline(0.0), Measures())
        if trouble is not None and trouble.paused:
            pause_ms = trouble.end_ms - trouble.begin_ms
            self._clock.after(trouble.begin_ms, partial(self._edge_core.interrupt, pause_ms))
        spec = edge.SessionSpec(
            session="s", client="c", edge="e", method=method, prompt=_PROMPT,
            sampling=SamplingParams(), max_new_tokens=len(agrees), tokenizer_digest="d",
            drafts=drafts,
        )  # fmt: skip
        control = edge.Control(threshold=0.0, window=_WINDOW, conservative_threshold=0.0)
        self._edge, effects = edge.begin(spec, control)
        self._run_edge(effects)
        self._at_edge_after(_TICK_MS, self._tick)

    def run(self) -> Outcome:
        """To its end."""
        while not self._finished:
            self._clock.advance()
        self._outcome.measures = self._edge.measures
        return self._outcome

    # --- the text -----------------------------------------------------------------------------

    def _target_token(self, position: int) -> int:
        return 3 * (position % 1000) + 3

    def _choice(self, position: int) -> Choice:
        index = position - len(_PROMPT)
        right = index >= len(self._agrees) or self._agrees[index]
        return choice_at(right, self._seed, position)

    def _drafted_token(self, position: int) -> int:
        return self._target_token(position) + (_WRONG if self._choice(position).rank else 0)

    def _rows(self, start: int, num_tokens: int) -> tuple[Int32Array, Float16Array]:
        """First and second choices: int32[n, 2], float16[n, 2]."""
        choices = [self._choice(position) for position in range(start, start + num_tokens)]
        ids = [
            (
                self._drafted_token(position),
                self._target_token(position) + (0 if choice.rank == 1 else _OTHER),
            )
            for position, choice in enumerate(choices, start)
        ]
        return (
            np.array(ids, dtype=np.int32).reshape(-1, 2),
            np.array([choice.probs for choice in choices], dtype=np.float16).reshape(-1, 2),
        )

    # --- the edge -----------------------------------------------------------------------------

    def _at_edge_after(self, delay_ms: float, action: Callable[[], None]) -> None:
        """What happens at the edge then, or once its pause is over."""

        def act() -> None:
            trouble, now_ms = self._trouble, self._clock.now_ms
            if trouble is not None and trouble.paused and trouble.covers(now_ms):
                self._clock.after(trouble.end_ms - now_ms, action)
            else:
                action()

        self._clock.after(delay_ms, act)

    def _edge_event(self, event: edge_events.Event) -> None:
        self._edge, effects = edge.step(self._edge, event)
        self._run_edge(effects)

    def _run_edge(self, effects: tuple[edge_events.Effect, ...]) -> None:
        now_ms, kept = self._clock.now_ms, self._outcome
        for effect in effects:
            match effect:
                case edge_events.Draft():
                    assert self._edge.job is not None
                    self._draft_queue.append((effect, self._edge.job.start))
                    self._at_edge_after(self._device.start_ms, self._next_draft)
                case edge_events.Send(message):
                    if isinstance(message, DraftWindow):
                        kept.timeline.sent(message, now_ms)
                    if not self._lost():
                        self._clock.after(self._one_way_ms, partial(self._at_cloud, message))
                case edge_events.Commit(_, tokens, _):
                    kept.pieces.append((now_ms, len(tokens)))
                case edge_events.WindowJudged():
                    kept.timeline.judged(effect)
                    kept.accepted_tokens += effect.num_accepted
                case edge_events.SeekPeer():
                    self._at_edge_after(effect.pause_ms, self._start)
                case edge_events.Finish():
                    self._finished = True
                case edge_events.Crop() | edge_events.CheckPeer():
                    pass

    def _start(self) -> None:
        started = edge_events.Started(frozenset(), self._clock.now_ms, self._recalled)
        self._edge_event(started)

    def _tick(self) -> None:
        self._edge_event(edge_events.Tick(self._clock.now_ms))
        self._at_edge_after(_TICK_MS, self._tick)

    def _next_draft(self) -> None:
        if self._draft_queue and not self._edge_core.busy:
            draft, start = self._draft_queue.pop(0)
            prompt_ms, self._prompt_left_ms = self._prompt_left_ms, 0.0
            began_ms = self._clock.now_ms
            begin = partial(self._draft_token, draft, start, (), began_ms)
            if prompt_ms:
                self._edge_core.work(prompt_ms, 1.0, begin)
            else:
                begin()

    def _draft_token(
        self, draft: edge_events.Draft, start: int, tokens: tuple[int, ...], began_ms: float
    ) -> None:
        """Draft on, or hand over what there is: all of it, or what was wanted until now."""
        job = self._edge.job
        wanted = job is not None and job.number == draft.job
        if wanted and len(tokens) < draft.count:
            token = self._drafted_token(start + len(tokens))
            then = partial(self._draft_token, draft, start, (*tokens, token), began_ms)
            self._edge_core.work(self._device.step_ms, self._device.step_slowdown, then)
            return
        self._drafted(draft, start, tokens, began_ms)
        self._next_draft()

    def _drafted(
        self, draft: edge_events.Draft, start: int, tokens: tuple[int, ...], began_ms: float
    ) -> None:
        now_ms = self._clock.now_ms
        draft_ms = now_ms - began_ms
        self._outcome.drafted_tokens += len(tokens)
        self._outcome.timeline.drafted(start, len(tokens), draft_ms, now_ms)
        ids, probs = self._rows(start, len(tokens))
        num_cached = start + max(len(tokens) - 1, 0)
        self._edge_event(
            edge_events.Drafted(draft.job, start, num_cached, tokens, ids, probs, draft_ms, now_ms)
        )

    def _at_edge(self, message: Message) -> None:
        now_ms = self._clock.now_ms
        self._edge_core.interrupt(self._device.feedback_ms)
        if isinstance(message, SessionReady):
            self._edge_event(edge_events.Opened(message, now_ms))
        elif isinstance(message, Feedback):
            self._edge_event(edge_events.FeedbackArrived(message, now_ms))

    # --- the cloud ----------------------------------------------------------------------------

    def _lost(self) -> bool:
        """Whether the link loses what is sent now."""
        trouble = self._trouble
        return trouble is not None and not trouble.paused and trouble.covers(self._clock.now_ms)

    def _at_cloud(self, message: Message) -> None:
        self._cloud_core.interrupt(self._device.window_ms)
        now_ms = self._clock.now_ms
        match message:
            case OpenSession() if self._cloud is not None:
                self._cloud_event(cloud_events.OpenArrived(message, next(self._handles)))
            case OpenSession():
                self._cloud, effects = cloud.begin(
                    message, self._method, "cloud", _LIMITS, next(self._handles)
                )
                self._run_cloud(effects)
            case DraftWindow() | Ack() if (
                self._cloud is None or message.handle != self._cloud.handle
            ):
                pass
            case DraftWindow():
                self._cloud_event(cloud_events.WindowArrived(message, now_ms))
            case Ack():
                self._cloud_event(cloud_events.AckArrived(message, now_ms))
            case CloseSession():
                self._cloud = None

    def _cloud_event(self, event: cloud_events.Event) -> None:
        if self._cloud is not None:
            self._cloud, effects = cloud.step(self._cloud, event)
            self._run_cloud(effects)

    def _run_cloud(self, effects: tuple[cloud_events.Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case cloud_events.Prefill(job, tokens):
                    if tokens:
                        self._target.run([Segment(self._cache, tokens)])
                    self._cloud_core.work(
                        self._device.pass_prompt_ms, 1.0, partial(self._prefilled, job)
                    )
                case cloud_events.Forward():
                    self._clock.after(0.0, partial(self._pass, effect))
                case cloud_events.Crop(length, path):
                    self._target.keep(self._cache, length, path)
                case cloud_events.Send(message):
                    if not self._lost():
                        self._at_edge_after(self._one_way_ms, partial(self._at_edge, message))
                case _:
                    pass  # reports are for the controller

    def _prefilled(self, job: int) -> None:
        self._cloud_event(cloud_events.Prefilled(job, self._clock.now_ms))

    def _pass(self, forward: cloud_events.Forward) -> None:
        """The model is free for it: sessions here have a target of their own."""
        state, now_ms = self._cloud, self._clock.now_ms
        if state is None or state.job != forward.job:
            return
        ran = run_pass(self._target, self._cache, state, forward)
        if ran.rejected:
            self._cloud_event(ran.event(0.0, now_ms))
            return
        num_tokens = ran.num_run
        self._outcome.passes += 1
        self._cloud_core.work(
            self._device.target_ms(num_tokens),
            self._device.target_slowdown(num_tokens),
            partial(self._passed, ran, now_ms),
        )

    def _passed(self, ran: SessionPass[Positions], began_ms: float) -> None:
        now_ms = self._clock.now_ms
        self._cloud_event(ran.event(now_ms - began_ms, now_ms))
