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
    DraftWindow,
    Fault,
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
from tests.harness import LIMITS, EdgeCloudPair
from tests.toy import ToyCache, ToyDraft, ToyPair, ToyTarget, target_alone

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
    to_cloud: tuple[Message, ...] = ()
    to_edge: tuple[Message, ...] = ()
    answer: tuple[int, ...] = ()
    finished: bool = False
    faults: int = 0
    now_ms: float = 0.0


class Explorer:
    """Takes worlds from one to the next; knows what they share."""

    def __init__(
        self, pair: ToyPair, sampling: SamplingParams, method: Method, length: int
    ) -> None:
        self.pair, self.sampling, self.method = pair, sampling, method
        if sampling.coupled:
            self.text = PROMPT + target_alone(pair, PROMPT, sampling, length, frozenset())
        else:
            lockstep = EdgeCloudPair(pair, sampling, prompt=PROMPT, max_new_tokens=length)
            self.text = PROMPT + lockstep.run()
        self.spec = edge.SessionSpec("s1", "c1", "edge-1", method, PROMPT, sampling, length, "toy")
        self.shared_passes = self.prehits = self.rollbacks = 0

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
        for i, message in enumerate(world.to_cloud):
            yield from self._deliver(world, "to_cloud", i, self._at_cloud, message)
        for i, message in enumerate(world.to_edge):
            yield from self._deliver(world, "to_edge", i, self._at_edge, message)
        if world.faults and world.cloud is not None:
            yield replace(
                world, faults=world.faults - 1, cloud=None, running=None, result=None,
                target_cache=(), target_rows=(),
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
                    world = replace(world, to_cloud=(*world.to_cloud, message))
                case edge_events.Commit(start, tokens, _):
                    assert start == len(world.answer)
                    world = replace(world, answer=world.answer + tokens)
                case edge_events.WindowJudged(rolled_back=True):
                    self.rollbacks += 1
                case edge_events.SeekPeer():
                    world = self._edge(world, edge_events.Started(frozenset(), world.now_ms))
                case edge_events.Finish():
                    world = replace(world, finished=True, draft=None)
                case _:
                    pass
        assert state.tokens[: len(before.tokens)] == before.tokens
        assert state.tokens == PROMPT + world.answer == self.text[: len(state.tokens)]
        assert not world.finished or state.tokens == self.text
        self._check_edge(world)
        return world

    def _begin_draft(self, world: World, job: edge_events.Draft) -> World:
        """A job that still runs was interrupted: its answer, whenever it comes, is ignored."""
        state, old = world.edge, world.draft
        if old is not None:
            ids, probs = self.pair.draft_probs(PROMPT)
            stale = edge_events.Drafted(old.job, 9, 9, (1,), ids[None], probs[None], 1.0, 0.0)
            assert edge.step(state, stale) == (state, ())
        assert len(state.drafted) + job.count <= state.flow.budget
        assert job.feed
        return replace(world, draft=job)

    def _check_edge(self, world: World) -> None:
        state = world.edge
        if world.finished:
            return
        windows = [flight.message for flight in state.in_flight]
        assert sum((w.token_ids for w in windows), ()) == state.drafted
        assert not any(w.awaits for w in windows[:-1])
        if windows and windows[-1].awaits:
            assert len(windows) == 1
            assert not state.drafting
        text = state.tokens + state.drafted
        assert world.draft_cache[: state.num_cached] == text[: state.num_cached]

    # --- the cloud ----------------------------------------------------------------------------

    def _at_cloud(self, world: World, message: Message) -> World:
        match message:
            case OpenSession() if world.cloud is None:
                state, effects = cloud.begin(message, self.method, "cloud-1", LIMITS)
                return self._run_cloud(replace(world, cloud=state), effects)
            case OpenSession():
                return self._cloud(world, cloud_events.OpenArrived(message))
            case DraftWindow() if world.cloud is None:
                return replace(world, to_edge=(*world.to_edge, cloud.unknown_session(message)))
            case DraftWindow():
                before = world.cloud
                world = self._cloud(world, cloud_events.WindowArrived(message, world.now_ms))
                assert before is not None
                old = (message.incarnation, message.epoch) < (before.incarnation, before.epoch)
                assert not old or world.cloud == before, "a stale window changes nothing"
                return world
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
                    full = (
                        ToyTarget(self.pair).row(self._cache(world), index, Want(0, full=True)).full
                    )
                    assert full is not None
                    row = cloud_events.FullRowReady(job, full, world.now_ms)
                    world = replace(world, result=row)
                case cloud_events.Crop(length):
                    world = self._crop(world, length)
                case cloud_events.Send(message):
                    assert not isinstance(message, Fault), message
                    self._check_bonus(world, message)
                    world = replace(world, to_edge=(*world.to_edge, message))
                case _:
                    pass
        self._check_cloud(world)
        return world

    def _crop(self, world: World, length: int) -> World:
        """A pass that has been asked for runs before the crop does."""
        if world.running is not None:
            world = replace(self._pass(world, world.running), result=None)
        return replace(world, target_cache=world.target_cache[:length])

    def _cache(self, world: World) -> ToyCache:
        return ToyCache(self.sampling, world.target_cache, rows=list(world.target_rows))

    def _pass(self, world: World, forward: cloud_events.Forward) -> World:
        assert world.cloud is not None
        cache = self._cache(world)
        ran = run_pass(ToyTarget(self.pair), cache, world.cloud, forward)
        self.prehits += ran.rejected
        self.shared_passes += ran.forward.num_windows > 1
        return replace(
            world, running=None, result=ran.event(1.0, world.now_ms), target_cache=cache.tokens,
            target_rows=tuple(cache.rows),
        )  # fmt: skip

    def _check_cloud(self, world: World) -> None:
        state = world.cloud
        assert state is not None
        known = state.tokens[: len(self.text)]  # a bonus token may lie behind the end
        assert known == self.text[: len(state.tokens)]
        if state.stage is cloud.Stage.IDLE:
            assert world.target_cache == state.tokens[: state.num_run]
            assert (state.kept is not None) is (state.num_run == len(state.tokens))

    def _check_bonus(self, world: World, message: Message) -> None:
        """Only where the edge waits: never with windows in flight."""
        if not isinstance(message, Feedback) or message.outcome is not Outcome.ACCEPTED:
            return
        state = world.edge
        current = (message.incarnation, message.epoch) == (state.incarnation, state.epoch)
        if message.next_token is not None and current and not world.finished:
            assert self.sampling.coupled
            assert [f.message.seq for f in state.in_flight] in ([message.seq], [])
            assert not (state.drafting and state.in_flight)

    def _at_edge(self, world: World, message: Message) -> World:
        if isinstance(message, SessionReady):
            return self._edge(world, edge_events.Opened(message, world.now_ms))
        assert isinstance(message, Feedback)
        return self._edge(world, edge_events.FeedbackArrived(message, world.now_ms))


def identity(world: World) -> tuple[Any, ...]:
    """What tells worlds apart: no times, no job numbers, no measures."""
    state, there = world.edge, world.cloud
    job = world.draft and (world.draft.feed, world.draft.count)
    running = world.running and (world.running.feed, world.running.num_windows)
    known = there and (
        there.incarnation, there.epoch, there.next_seq, there.tokens, there.num_run, there.stage,
        tuple(v.arrived.message.seq for v in there.verifications), there.kept,
        tuple(sorted(h.message.seq for h in there.held)),
        tuple(map(_named, there.feedbacks)),
    )  # fmt: skip
    return (
        state.phase, state.incarnation, state.epoch, state.next_seq, state.tokens, state.drafted,
        tuple(map(_named, (f.message for f in state.in_flight))), state.num_cached, state.drafting,
        state.job_awaits, state.flow, state.growth, known, job, world.draft_cache, running,
        type(world.result), world.target_cache, tuple(sorted(map(_named, world.to_cloud))),
        tuple(sorted(map(_named, world.to_edge))), world.finished, world.faults,
    )  # fmt: skip


def _named(message: Any) -> tuple[Any, ...]:
    match message:
        case DraftWindow():
            return ("window", message.incarnation, message.epoch, message.seq, message.token_ids,
                    message.awaits)  # fmt: skip
        case Feedback():
            return ("feedback", message.incarnation, message.epoch, message.seq,
                    str(message.outcome), message.num_accepted)  # fmt: skip
        case _:
            return (type(message).__name__, message.incarnation)


def explore(explorer: Explorer, faults: int, limit: int) -> int:
    """Visit every reachable world; assert that each can come to the end. Returns how many.

    Raises:
        AssertionError: something does not hold, a world cannot end, or there are over `limit`.
    """
    start = explorer.first(faults)
    seen: dict[tuple[Any, ...], int] = {identity(start): 0}
    worlds, before, ends = [start], [[]], []  # type: ignore[var-annotated]
    for number, world in enumerate(worlds):  # grows while it is walked
        if world.finished:
            ends.append(number)
        for after in explorer.following(world):
            key = identity(after)
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
