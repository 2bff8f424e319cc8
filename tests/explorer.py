"""A model checker over both machines: every order of events of a small session.

A world is the two machines, the toy models' caches, the jobs that run and the messages under way,
all of it immutable. From each world every next event is taken: a draft or a pass ends, any message
arrives (the link reorders), and as often as `faults` allows one is lost, arrives a second time, or
the cloud forgets everything; where nothing moves any more, a timeout fires. Worlds that differ only
in times and job numbers are one. What must hold is asserted in every world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from bus.protocol.messages import (
    Ack,
    DraftWindow,
    Fault,
    FaultCode,
    Feedback,
    Message,
    OpenSession,
    Outcome,
    SessionReady,
)
from decoding import cloud, cloud_events, edge, edge_events
from decoding.engine import Want
from decoding.methods import Method
from decoding.passes import run_pass
from decoding.sampling import SamplingParams
from tests.harness import LIMITS, check_in_flight
from tests.toy import ToyCache, ToyDraft, ToyPair, target_alone

PROMPT = (1, 2)
PATIENCE_MS = 1e6


class World(Struct, frozen=True):
    """All there is. `running` is a pass that has not begun, `result` what a job will answer."""

    edge: edge.EdgeState
    cloud: cloud.CloudState | None = None
    draft: edge_events.Draft | None = None
    draft_cache: tuple[int, ...] = ()
    running: cloud_events.Forward | None = None
    result: cloud_events.Event | None = None
    target_cache: tuple[int, ...] = ()
    target_rows: tuple[Any, ...] = ()
    target_tree: tuple[tuple[int, ...], ...] = ()
    to_cloud: tuple[Message, ...] = ()
    to_edge: tuple[Message, ...] = ()
    answer: tuple[int, ...] = ()
    num_opened: int = 0
    finished: bool = False
    faults: int = 0
    now_ms: float = 0.0


class Explorer:
    """Takes worlds from one to the next; knows what they share."""

    def __init__(
        self,
        pair: ToyPair,
        sampling: SamplingParams,
        method: Method,
        length: int,
        lease: int = 256,
        drafts: bool = True,
        ordered: bool = False,
        tree_tokens: int = 3,
    ) -> None:
        self.ordered = ordered
        self.pair, self.sampling, self.method = pair, sampling, method
        self.limits = replace(LIMITS, lease=lease, tree_tokens=tree_tokens)
        self.target = pair.target()
        self.text: tuple[int, ...] | None = None
        if method.lossless and sampling.coupled:
            self.text = PROMPT + target_alone(pair, PROMPT, sampling, length, frozenset())
        self.spec = edge.SessionSpec(
            "s1", "c1", "edge-1", method, PROMPT, sampling, length, "toy", drafts
        )
        self.shared_passes = self.prehits = self.rollbacks = self.own_passes = self.late = 0
        self.branches = self.rescued = self.trees = 0

    def first(self, faults: int) -> World:
        """A session that is about to open."""
        state, _ = edge.begin(self.spec, edge.Control(0.15, 2, 0.02))
        return self._edge(World(state, faults=faults), edge_events.Started(frozenset(), 0.0))

    def following(self, world: World) -> Iterator[World]:
        """Every world that may come next."""
        if world.finished:
            return
        if world.draft is not None:
            yield self._drafted(world, world.draft)
        if world.running is not None:
            yield self._pass(world, world.running)
        if world.result is not None:
            yield self._cloud(replace(world, result=None), world.result)
        most = 1 if self.ordered else None
        for i, message in enumerate(world.to_cloud[:most]):
            yield from self._deliver(world, "to_cloud", i, self._at_cloud, message)
        for i, message in enumerate(world.to_edge[:most]):
            yield from self._deliver(world, "to_edge", i, self._at_edge, message)
        if world.faults and world.cloud is not None:
            yield replace(
                world, faults=world.faults - 1, cloud=None, running=None, result=None,
                target_cache=(), target_rows=(), target_tree=(),
            )  # fmt: skip
        if not (world.to_cloud or world.to_edge or world.running or world.result or world.draft):
            later = world.now_ms + PATIENCE_MS
            yield self._edge(replace(world, now_ms=later), edge_events.Tick(later))

    def _deliver(
        self,
        world: World,
        line: str,
        index: int,
        arrive: Callable[[World, Any], World],
        message: Message,
    ) -> Iterator[World]:
        waiting = getattr(world, line)
        without = replace(world, **{line: waiting[:index] + waiting[index + 1 :]})
        yield arrive(without, message)
        if world.faults:
            yield replace(without, faults=world.faults - 1)
            yield arrive(replace(world, faults=world.faults - 1), message)

    # --- the edge -----------------------------------------------------------------------------

    def _drafted(self, world: World, job: edge_events.Draft) -> World:
        draft = ToyDraft(self.pair, self.sampling, world.draft_cache)
        start, tokens, ids, probs = draft.draft(job.feed, job.count, frozenset())
        world = replace(world, draft=None, draft_cache=draft.cache)
        event = edge_events.Drafted(
            job.job, start, len(draft.cache), tokens, ids, probs, 1.0, world.now_ms
        )
        return self._edge(world, event)

    def _edge(self, world: World, event: edge_events.Event) -> World:
        before = world.edge
        state, effects = edge.step(before, event)
        world = replace(world, edge=state)
        for effect in effects:
            match effect:
                case edge_events.Draft():
                    world = self._begin_draft(world, effect)
                case edge_events.Crop(length):
                    world = replace(world, draft_cache=world.draft_cache[:length])
                case edge_events.Send(message):
                    self.branches += isinstance(message, DraftWindow) and message.branch
                    world = replace(world, to_cloud=(*world.to_cloud, message))
                case edge_events.Commit(start, tokens, _):
                    assert start == len(world.answer)
                    world = replace(world, answer=world.answer + tokens)
                case edge_events.WindowJudged(rolled_back=True, outcome=outcome, rescued=rescued):
                    self.rollbacks += 1
                    self.rescued += rescued
                    self.prehits += outcome is Outcome.PREHIT_REJECTED
                case edge_events.SeekPeer():
                    world = self._edge(world, edge_events.Started(frozenset(), world.now_ms))
                case edge_events.Finish():
                    world = replace(world, finished=True, draft=None)
                case _:
                    pass
        assert state.tokens[: len(before.tokens)] == before.tokens
        assert state.tokens == PROMPT + world.answer
        if self.text is not None:
            assert state.tokens == self.text[: len(state.tokens)]
        assert not world.finished or state.num_remaining == 0
        self._check_edge(world)
        return world

    def _begin_draft(self, world: World, job: edge_events.Draft) -> World:
        """A job that still runs was interrupted: its answer, whenever it comes, is ignored."""
        state, old = world.edge, world.draft
        if old is not None:
            ids, probs = self.pair.draft_probs(PROMPT)
            stale = edge_events.Drafted(old.job, 9, 9, (1,), ids[None], probs[None], 1.0, 0.0)
            assert edge.step(state, stale) == (state, ())
        assert state.job is not None
        at = state.job.start - len(state.tokens)
        assert at + job.count <= state.flow.budget
        assert job.feed
        return replace(world, draft=job)

    def _check_edge(self, world: World) -> None:
        state = world.edge
        if world.finished:
            return
        check_in_flight(state)
        if state.in_flight and state.flow.awaits:
            assert state.job is None or not state.job.awaits
        assert world.draft_cache[: state.num_cached] == state.text[: state.num_cached]

    # --- the cloud ----------------------------------------------------------------------------

    def _at_cloud(self, world: World, message: Message) -> World:
        there = world.cloud
        match message:
            case OpenSession():
                handle = world.num_opened + 1
                world = replace(world, num_opened=handle)
                if there is not None:
                    return self._cloud(world, cloud_events.OpenArrived(message, handle))
                state, effects = cloud.begin(message, self.method, "cloud-1", self.limits, handle)
                return self._run_cloud(replace(world, cloud=state), effects)
            case DraftWindow() | Ack() if there is None:
                return replace(world, to_edge=(*world.to_edge, cloud.unknown_session(message)))
            case DraftWindow() | Ack() if there is not None and there.handle != message.handle:
                return world
            case DraftWindow():
                assert there is not None
                self.late += message.start < len(there.tokens)
                return self._cloud(world, cloud_events.WindowArrived(message, world.now_ms))
            case Ack():
                return self._cloud(world, cloud_events.AckArrived(message, world.now_ms))
            case _:
                return replace(world, cloud=None, running=None, result=None, target_cache=())

    def _cloud(self, world: World, event: cloud_events.Event) -> World:
        assert world.cloud is not None
        state, effects = cloud.step(world.cloud, event)
        return self._run_cloud(replace(world, cloud=state), effects)

    def _run_cloud(self, world: World, effects: tuple[cloud_events.Effect, ...]) -> World:
        for effect in effects:
            match effect:
                case cloud_events.Prefill(job, tokens):
                    world = replace(
                        world, target_cache=world.target_cache + tokens,
                        result=cloud_events.Prefilled(job, world.now_ms),
                    )  # fmt: skip
                case cloud_events.Forward():
                    world = replace(world, running=effect)
                case cloud_events.FetchRow(job, index):
                    full = self.target.row(self._cache(world), index, Want(0, full=True)).full
                    assert full is not None
                    row = cloud_events.FullRowReady(job, full, world.now_ms)
                    world = replace(world, result=row)
                case cloud_events.Crop(length, path):
                    world = self._crop(world, length, path)
                case cloud_events.Send(message):
                    assert not isinstance(message, Fault), message
                    world = replace(world, to_edge=(*world.to_edge, message))
                case _:
                    pass
        self._check_cloud(world)
        return world

    def _crop(self, world: World, length: int, path: tuple[int, ...]) -> World:
        """A pass that has been asked for runs before the crop does."""
        if world.running is not None:
            world = replace(self._pass(world, world.running), result=None)
        cache = self._cache(world)
        self.target.keep(cache, min(length, self.target.length(cache)), path)
        return replace(world, target_cache=cache.tokens, target_tree=())

    def _cache(self, world: World) -> ToyCache:
        return ToyCache(
            self.sampling, world.target_cache, world.target_tree, list(world.target_rows),
            speculator=self.method.speculator,
        )  # fmt: skip

    def _pass(self, world: World, forward: cloud_events.Forward) -> World:
        assert world.cloud is not None
        cache = self._cache(world)
        ran = run_pass(self.target, cache, world.cloud, forward)
        self.trees += ran.plan.tree is not None
        self.shared_passes += len({place.drafted for place in ran.plan.path}) > 1
        self.own_passes += not ran.plan.path
        return replace(
            world, running=None, result=ran.event(1.0, world.now_ms), target_cache=cache.tokens,
            target_rows=tuple(cache.rows), target_tree=cache.branches,
        )  # fmt: skip

    def _check_cloud(self, world: World) -> None:
        state = world.cloud
        assert state is not None
        if self.text is not None:
            known = state.tokens[: len(self.text)]  # what was drafted may lie beyond the end
            assert known == self.text[: len(state.tokens)]
        if isinstance(state.stage, cloud.Idle):
            assert world.target_cache == state.tokens[: state.num_run]
            assert (state.kept is not None) is (state.num_run == len(state.tokens))
        ahead = len(state.tokens) - state.acknowledged
        drafted = self.spec.max_new_tokens
        assert ahead <= state.limits.lease + drafted

    def _at_edge(self, world: World, message: Message) -> World:
        match message:
            case SessionReady():
                return self._edge(world, edge_events.Opened(message, world.now_ms))
            case Fault():
                return self._edge(world, edge_events.FaultArrived(message, world.now_ms))
            case _:
                assert isinstance(message, Feedback)
                return self._edge(world, edge_events.FeedbackArrived(message, world.now_ms))


def identity(world: World, ordered: bool) -> tuple[Any, ...]:
    """What tells worlds apart: no times, no job numbers, no measures, and no order of messages
    where the link does not keep it."""
    arranged = list if ordered else sorted
    state, there = world.edge, world.cloud
    job = world.draft and (world.draft.feed, world.draft.count)
    known = there and (
        there.incarnation, there.handle, there.tokens, there.num_run, there.stage.name,
        there.acknowledged, there.sent_length, there.kept, tuple(sorted(there.judged)),
        tuple(sorted((w.start, w.hashes) for w in there.drafts.windows)),
    )  # fmt: skip
    stage = state.stage
    handle = stage.handle if isinstance(stage, edge.Running) else 0
    return (
        stage.name, handle, state.incarnation, state.tokens, state.drafted,
        tuple((f.number, f.start, f.tokens) for f in state.in_flight), state.num_cached,
        state.job and (state.job.start, state.job.fork), state.branches, state.flow, state.growth,
        state.setbacks, known, job,
        world.draft_cache, world.running is None, type(world.result), world.target_cache,
        world.target_tree,
        tuple(arranged(map(_named, world.to_cloud))), tuple(arranged(map(_named, world.to_edge))),
        world.finished, world.faults,
    )  # fmt: skip


def _named(message: Any) -> tuple[Any, ...]:
    match message:
        case DraftWindow():
            return ("window", message.handle, message.number, message.start, message.token_ids)
        case Ack():
            return ("ack", message.handle, message.length, message.again)
        case Feedback():
            return ("feedback", message.handle, message.start, message.token_ids)
        case Fault():
            return ("fault", message.handle or 0, message.code is FaultCode.UNKNOWN_SESSION)
        case _:
            return (type(message).__name__, message.incarnation, getattr(message, "handle", 0))


def explore(explorer: Explorer, faults: int, limit: int) -> int:
    """Visit every reachable world; assert that each can come to the end. Returns how many.

    Raises:
        AssertionError: something does not hold, a world cannot end, or there are over `limit`.
    """
    start = explorer.first(faults)
    seen: dict[tuple[Any, ...], int] = {identity(start, explorer.ordered): 0}
    worlds, before, ends = [start], [[]], []  # type: ignore[var-annotated]
    for number, world in enumerate(worlds):  # grows while it is walked
        if world.finished:
            ends.append(number)
        for after in explorer.following(world):
            key = identity(after, explorer.ordered)
            if key not in seen:
                seen[key] = len(worlds)
                worlds.append(after)
                before.append([])
                assert len(worlds) <= limit, "more worlds than expected"
            before[seen[key]].append(number)
    can_end = set(ends)
    while ends:
        for number in before[ends.pop()]:
            if number not in can_end:
                can_end.add(number)
                ends.append(number)
    stuck = [worlds[i] for i in range(len(worlds)) if i not in can_end]
    assert not stuck, f"{len(stuck)} worlds cannot end, e.g. {stuck[0]}"
    return len(worlds)
