"""EdgeCloudPair: both state machines over a scripted link, with toy models (or real ones) and a
virtual clock.

Every message passes the real codec. The link delays, loses, repeats and reorders by a script of
numbers (hypothesis draws it), so a failure replays exactly. The harness also plays both shells,
and checks after every step what must always hold.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

from msgspec.structs import replace

from bus.protocol.arrays import Float16Array, Int32Array
from bus.protocol.codec import decode, encode
from bus.protocol.messages import (
    Ack,
    CloseSession,
    ControlUpdate,
    DraftWindow,
    Fault,
    Message,
    OpenSession,
)
from decoding import cloud, cloud_events, edge, edge_events, edge_state, methods
from decoding.engine import Target, TargetRow, Want
from decoding.methods import Method, find
from decoding.methods.base import Flow, PaceView
from decoding.passes import prompt_segment, run_pass
from decoding.prefix_hash import chain
from decoding.sampling import SamplingParams
from decoding.token_features import unpacked
from decoding.token_scores import TokenScore
from decoding.tree_reports import JudgedTree, tree_report
from decoding.verification import Judged, Reported, own_report, window_report

LIMITS = cloud.Limits(vocab_size=64, context_length=4096, threshold_min=-1.0, threshold_max=0.3)
TICK_MS = 50.0
SD = methods.sd.METHOD
WHOSE = Reported("s1", 1, "edge-1", "c1", "sd")


class Draft(Protocol):
    """A draft with the cache of one session.

    Attributes:
        cache: the tokens it holds.
    """

    @property
    def cache(self) -> tuple[int, ...]: ...

    def draft(
        self, feed: tuple[int, ...], count: int, eos: frozenset[int]
    ) -> tuple[int, tuple[int, ...], Int32Array, Float16Array]:
        """Start, tokens, and the rows they were drawn from."""
        ...

    def crop(self, length: int) -> None: ...


class Pair(Protocol):
    """The models of a session: `tests.toy.ToyPair`, or real ones."""

    @property
    def vocab_size(self) -> int: ...

    def target(self) -> Target[Any]: ...

    def held(self, cache: Any) -> tuple[int, ...]:
        """The tokens that a target's cache holds."""
        ...

    def draft(self, sampling: SamplingParams) -> Draft: ...


@dataclass(frozen=True)
class Fate:
    """What the link does to one message: copies (0 = lost), each with its delay."""

    delays_ms: tuple[float, ...] = (5.0,)


PERFECT = Fate()


class Steady:
    """`message` tokens a window, `budget` in flight, branches that are likelier than `rescue`."""

    name, forecasts = "steady", False

    def __init__(self, message: int, budget: int, rescue: float | None = None) -> None:
        self._flow = Flow(message, budget, awaits=False, rescue=rescue)

    def flow(self, view: PaceView) -> Flow:
        return self._flow


def check_in_flight(state: edge.EdgeState) -> None:
    """What is drafted is in flight, in windows that follow each other."""
    at = len(state.tokens)
    for flight in state.in_flight:
        assert flight.start <= at < flight.end
        assert flight.tokens[at - flight.start :] == state.text[at : flight.end]
        at = flight.end
    assert at == len(state.text)
    assert len(state.doubts) == len(state.drafted)
    for branch in state.branches:
        check_branch(state, branch)


def check_branch(state: edge.EdgeState, branch: edge_state.Branch) -> None:
    """A branch forks within what is drafted, goes another way, and is in flight as a whole."""
    assert len(state.tokens) <= branch.start < len(state.text)
    assert branch.tokens[0] != state.text[branch.start]
    assert len(branch.doubts) == len(branch.tokens) - 1
    before = state.text[len(state.tokens) : branch.start]
    hashes = list(chain(state.text_hash, (*before, *branch.tokens)))
    assert branch.text_hash == hashes[-1]
    at = branch.start
    for flight in branch.windows:
        assert flight.branch
        assert flight.start == at
        assert flight.follows == hashes[at - len(state.tokens)]
        assert flight.tokens == branch.tokens[at - branch.start :][: len(flight.tokens)]
        at = flight.end
    assert at == branch.end


@dataclass
class EdgeCloudPair:
    """One session between one edge and one cloud worker.

    `fates` gives the fate of message after message; when it runs out the link is perfect, so
    every run ends. `forget_at` lists message numbers before which the cloud loses all sessions
    (a restart); `windows` gives the window sizes the controller "publishes", one a feedback.
    """

    pair: Pair
    sampling: SamplingParams
    prompt: tuple[int, ...] = (1, 2, 3)
    max_new_tokens: int = 24
    eos: frozenset[int] = frozenset()
    method: Method = field(default_factory=lambda: SD)
    windows: tuple[int, ...] = (4,)
    fates: tuple[Fate, ...] = ()
    forget_at: frozenset[int] = frozenset()
    committed: tuple[int, ...] = ()
    draft_ms: float = 2.0
    verify_ms: float = 10.0
    busy_ms: float = 0.0
    lease: int = 256
    tree_tokens: int = 8
    drafts: bool = True
    threshold: float = 0.15
    rows: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self.now_ms = 0.0
        self.answer: tuple[int, ...] = self.committed
        self.accepted: list[bool] = []
        self.scores: tuple[TokenScore, ...] = ()
        self.prompt_scores: tuple[TokenScore, ...] = ()
        self.rescued = 0
        self.finished: edge_events.Finish | None = None
        self.faults: list[Fault] = []
        self.sent: list[Message] = []
        self.judged: list[Judged] = []
        self.trees: list[JudgedTree] = []
        self._cloud: cloud.CloudState | None = None
        self._target = self.pair.target()
        self._cache = self._target.open(self.sampling, self.method.speculator)
        self._draft = self.pair.draft(self.sampling)
        self._boot = 0
        self._handles = itertools.count(1)
        vocab_size = max(LIMITS.vocab_size, self.pair.vocab_size)
        self._limits = replace(
            LIMITS, eos=self.eos, lease=self.lease, vocab_size=vocab_size,
            tree_tokens=self.tree_tokens,
        )  # fmt: skip
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._fates: Iterator[Fate] = iter(self.fates)
        self._windows = itertools.cycle(self.windows)
        self._num_messages = 0
        spec = edge.SessionSpec(
            session="s1", client="c1", edge="edge-1", method=self.method, prompt=self.prompt,
            sampling=self.sampling, max_new_tokens=self.max_new_tokens,
            tokenizer_digest="toy", drafts=self.drafts, rows=self.rows, logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs, ignore_eos=self.ignore_eos,
        )  # fmt: skip
        control = edge.Control(
            threshold=self.threshold, window=next(self._windows), conservative_threshold=0.02
        )
        self.edge, effects = edge.begin(spec, control, self.committed)
        self._run_edge(effects)
        self._at(TICK_MS, self._tick)

    # --- running --------------------------------------------------------------------------

    def run(self, max_events: int = 20_000) -> tuple[int, ...]:
        """Run to the end; returns the answer's tokens."""
        for _ in range(max_events):
            if self.finished is not None:
                return self.answer
            self.now_ms, _order, action = heapq.heappop(self._queue)
            action()
        raise AssertionError(f"no end after {max_events} events: {self.edge}")

    def _at(self, delay_ms: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now_ms + delay_ms, next(self._order), action))

    def _tick(self) -> None:
        self._step_edge(edge_events.Tick(self.now_ms))
        self._at(TICK_MS, self._tick)

    # --- the edge's shell -----------------------------------------------------------------

    def _step_edge(self, event: edge_events.Event) -> None:
        before = self.edge
        self.edge, effects = edge.step(self.edge, event)
        self._check_edge(before)
        self._run_edge(effects)

    def _run_edge(self, effects: tuple[edge_events.Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case edge_events.Draft(job, feed, count):
                    self._run_draft(job, feed, count)
                case edge_events.Crop(length):
                    self._draft.crop(length)
                case edge_events.Learn(at, features):
                    cast(Any, self._draft).learn(at, unpacked(features))
                case edge_events.Send(message):
                    self._transmit(message, self._arrive_at_cloud)
                case edge_events.Commit(start, tokens, accepted, scores, prompt_scores):
                    self.scores += scores
                    self.prompt_scores += prompt_scores
                    assert start == len(self.answer), "commits only append, without a gap"
                    assert len(tokens) == len(accepted)
                    self.answer += tokens
                    self.accepted += accepted
                case edge_events.WindowJudged(rescued=rescued):
                    self.rescued += rescued
                    window, version = next(self._windows), len(self.sent)
                    update = ControlUpdate("s1", 1, version, self.threshold, window, 0, 0)
                    event = edge_events.ControlArrived(update, self.now_ms)
                    self._at(0.0, partial(self._step_edge, event))
                case edge_events.SeekPeer():
                    self._at(
                        1.0, lambda: self._step_edge(edge_events.Started(self.eos, self.now_ms))
                    )
                case edge_events.CheckPeer():
                    pass
                case edge_events.Finish():
                    self.finished = effect

    def _run_draft(self, job: int, feed: tuple[int, ...], count: int) -> None:
        start, tokens, ids, probs = self._draft.draft(feed, count, self.eos)
        took, num_cached = self.draft_ms * count, len(self._draft.cache)
        self._at(
            took,
            lambda: self._step_edge(
                edge_events.Drafted(job, start, num_cached, tokens, ids, probs, took, self.now_ms)
            ),
        )

    def _check_edge(self, before: edge.EdgeState) -> None:
        state = self.edge
        if isinstance(state.stage, edge.Finished):
            return
        assert state.tokens[: len(before.tokens)] == before.tokens, "commits only append"
        assert state.incarnation >= before.incarnation
        assert state.num_cached < len(state.text) or state.silent_at == len(state.text)
        check_in_flight(state)
        assert len(state.rows) == (len(state.tokens) if self.rows else 0)
        if state.job is None:
            assert self._draft.cache[: state.num_cached] == state.text[: state.num_cached]

    # --- the cloud's shell ----------------------------------------------------------------

    def _arrive_at_cloud(self, message: Any) -> None:
        match message:
            case OpenSession() if self._cloud is None:
                fault = cloud.check_open(message, "toy", self._limits)
                assert fault is None, fault
                method = find(message.method) or self.method
                self._cache = self._target.open(self.sampling, method.speculator)
                self._cloud, effects = cloud.begin(
                    message, method, "cloud-1", self._limits, next(self._handles)
                )
                self._run_cloud(effects)
            case OpenSession():
                self._step_cloud(cloud_events.OpenArrived(message, next(self._handles)))
            case DraftWindow() | Ack() if (
                self._cloud is None or self._cloud.handle != message.handle
            ):
                if self._cloud is None:
                    self._transmit(cloud.unknown_session(message), self._arrive_at_edge)
            case DraftWindow():
                self._step_cloud(cloud_events.WindowArrived(message, self.now_ms))
            case Ack():
                self._step_cloud(cloud_events.AckArrived(message, self.now_ms))
            case CloseSession():
                self._cloud = None

    def _step_cloud(self, event: cloud_events.Event) -> None:
        if self._cloud is None:
            return
        self._cloud, effects = cloud.step(self._cloud, event)
        self._run_cloud(effects)

    def _run_cloud(self, effects: tuple[cloud_events.Effect, ...]) -> None:
        boot = self._boot
        for effect in effects:
            if boot != self._boot:  # the worker has restarted over one of them
                return
            match effect:
                case cloud_events.Prefill(job, tokens):
                    rows: tuple[TargetRow, ...] = ()
                    if tokens:
                        [given] = self._target.run([prompt_segment(self._cache, effect)])
                        rows = tuple(given)
                    self._later_cloud(partial(cloud_events.Prefilled, job, rows=rows))
                case cloud_events.Forward():
                    self._at(self.busy_ms, partial(self._pass, self._boot, effect))
                case cloud_events.FetchRow(job, index):
                    row = self._target.row(self._cache, index, Want(0, full=True)).full
                    assert row is not None
                    self._later_cloud(partial(cloud_events.FullRowReady, job, row))
                case cloud_events.Crop(length, path):
                    self._target.keep(self._cache, length, path)
                case cloud_events.Send(message):
                    self._transmit(message, self._arrive_at_edge)
                case cloud_events.Report(message):
                    decode(encode(message))
                case cloud_events.ReportWindow(judged):
                    self.judged.append(judged)
                    decode(encode(window_report(judged, WHOSE)))
                case cloud_events.ReportTree(tree):
                    self.trees.append(tree)
                    decode(encode(tree_report(tree, WHOSE)))
                case cloud_events.ReportOwn(own):
                    decode(encode(own_report(own, WHOSE)))
        self._check_cloud()

    def _pass(self, boot: int, forward: cloud_events.Forward) -> None:
        """The model is free for this session, `busy_ms` after it has asked."""
        if boot != self._boot or self._cloud is None or self._cloud.job != forward.job:
            return
        ran = run_pass(self._target, self._cache, self._cloud, forward)
        took_ms = 0.0 if ran.rejected else self.verify_ms
        self._later_cloud(partial(ran.event, took_ms), took_ms)

    def _later_cloud(
        self, event: Callable[[float], cloud_events.Event], after_ms: float | None = None
    ) -> None:
        """Deliver `event(now_ms)` after the pass, unless the worker has restarted meanwhile."""
        boot = self._boot

        def deliver() -> None:
            if boot == self._boot:
                self._step_cloud(event(self.now_ms))

        self._at(self.verify_ms if after_ms is None else after_ms, deliver)

    def _check_cloud(self) -> None:
        state = self._cloud
        if state is not None and isinstance(state.stage, cloud.Idle):
            held = self.pair.held(self._cache)
            assert held == state.tokens[: state.num_run], "cache holds the text"

    # --- the link -------------------------------------------------------------------------

    def _transmit(self, message: Message, arrive: Callable[[Any], None]) -> None:
        self.sent.append(message)
        frame = encode(message)
        fate = next(self._fates, PERFECT)
        if self._num_messages in self.forget_at:
            self._cloud, self._boot = None, self._boot + 1
        self._num_messages += 1
        for delay_ms in fate.delays_ms:
            self._at(delay_ms, lambda: arrive(decode(frame)))

    def _arrive_at_edge(self, message: Any) -> None:
        match message:
            case Fault():
                self.faults.append(message)
                self._step_edge(edge_events.FaultArrived(message, self.now_ms))
            case _ if type(message).__name__ == "SessionReady":
                self._step_edge(edge_events.Opened(message, self.now_ms))
            case _:
                self._step_edge(edge_events.FeedbackArrived(message, self.now_ms))
