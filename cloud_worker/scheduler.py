"""Which rows the target runs next: continuous batching over the sessions that have work.

The model thread repeats three steps:

    schedule     every session with work gets a row; then trees and windows share a budget equally,
                 and prompts share a chunk that keeps the pass to about two decode passes
    run          one pass over all of it
    postprocess  what is complete goes to its session as an event, which may ask for more at once:
                 nothing waits for the event loop between two passes

A tree runs in one piece, so its size is decided when its pass begins: it is at most its session's
share of the budget. Of each session one piece of work is under way at most. Its text does not
depend on the sessions beside it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

from cloud_worker.costs import PassCosts
from decoding.cloud_events import Crop, Event, FetchRow, Forward, FullRowReady, Prefill, Prefilled
from decoding.cloud_state import CloudState
from decoding.engine import Cache, Segment, Target, TargetRow, Want
from decoding.passes import SessionPass, begin_pass, prompt_segment
from engines.energy import PowerGauge
from engines.thread import ModelThread, now_ms

T = TypeVar("T")
CacheOf_co = TypeVar("CacheOf_co", covariant=True)

BUDGET = 64
"""Rows of windows and trees in a pass, beside each session's first [ours]."""


class Client(Protocol[CacheOf_co]):
    """A session as the scheduler sees it, on the model thread."""

    @property
    def cache(self) -> CacheOf_co: ...

    @property
    def state(self) -> CloudState: ...

    def completed(self, event: Event) -> None:
        """Its work is done. It may ask for more at once (`Scheduler.take`); it raises nothing."""
        ...


@dataclass(slots=True, eq=False)
class Work(Generic[Cache]):
    """What a session waits for.

    Attributes:
        crops: what is cut off its cache first, in this order. number: rises from work to work.
        tokens: of a prompt, left to run; rows: of those that have run, where wanted. begun: its
            pass.
        model_ms: duration of its beginning and its passes; share_ms: its rows' share of them.
    """

    client: Client[Cache]
    effect: Prefill | Forward | FetchRow
    crops: tuple[Crop, ...]
    number: int
    is_new: bool = True
    tokens: tuple[int, ...] = ()
    rows: list[TargetRow] = field(default_factory=list)
    begun: SessionPass[Cache] | None = None
    model_ms: float = 0.0
    share_ms: float = 0.0

    @property
    def num_left(self) -> int:
        """Rows it still needs."""
        return len(self.tokens) if self.begun is None else self.begun.num_left

    @property
    def whole(self) -> bool:
        """Whether all that is left runs in one pass."""
        return self.begun is not None and self.begun.whole

    def begin(self, target: Target[Cache], most: int) -> None:
        """Roll the cache back, and judge a window by the cached row or have a tree of at most so
        many tokens proposed; all of it is the model's time."""
        self.is_new = False
        began_ms = now_ms()
        cache, effect = self.client.cache, self.effect
        for crop in self.crops:
            target.keep(cache, min(crop.length, target.length(cache)), crop.path)
        if isinstance(effect, Prefill):
            self.tokens = effect.tokens
        elif isinstance(effect, Forward):
            self.begun = begin_pass(target, cache, self.client.state, effect, most)
        self.model_ms = self.share_ms = now_ms() - began_ms

    def segment(self, num_rows: int) -> Segment[Cache]:
        """Its next rows."""
        if self.begun is not None:
            return self.begun.segment(num_rows)
        assert isinstance(self.effect, Prefill)
        first = len(self.effect.tokens) - len(self.tokens)
        return prompt_segment(self.client.cache, self.effect, first, num_rows)

    def add(self, segment: Segment[Cache], rows: list[TargetRow], num_rows: int, ms: float) -> None:
        """Its rows of a pass of `num_rows` rows."""
        self.model_ms += ms
        self.share_ms += ms * len(segment.tokens) / num_rows
        if self.begun is not None:
            self.begun.add(segment, rows)
        else:
            self.rows += rows
        self.tokens = self.tokens[len(segment.tokens) :]

    def event(self, target: Target[Cache]) -> Event:
        """The event for its session."""
        job = self.effect.job
        if isinstance(self.effect, FetchRow):
            row = target.row(self.client.cache, self.effect.index, Want(0, full=True))
            assert row.full is not None
            return FullRowReady(job, row.full, now_ms())
        if self.begun is None:
            return Prefilled(job, now_ms(), tuple(self.rows))
        share = self.share_ms / self.model_ms if self.model_ms else 1.0
        return self.begun.event(self.model_ms, now_ms(), share)


Batch = dict[Work[Cache], int]
"""Work, and how many rows of it a pass takes."""


class Scheduler(Generic[Cache]):
    """Work of all sessions on one target, done on the model thread.

    Args:
        failed: gets (client, exception); on the model thread.
        passed: gets (sessions, rows, milliseconds) of each pass; on the model thread.
    """

    def __init__(
        self,
        target: Target[Cache],
        thread: ModelThread,
        gauge: PowerGauge,
        failed: Callable[[Client[Cache], Exception], None],
        passed: Callable[[int, int, float], None] = lambda *_: None,
    ) -> None:
        self._target = target
        self._thread = thread
        self._gauge = gauge
        self._turn_waits = False
        self._failed = failed
        self._passed = passed
        self._work: deque[Work[Cache]] = deque()
        self._numbers = itertools.count()
        self._costs = PassCosts()

    def submit(
        self,
        client: Client[Cache],
        effect: Prefill | Forward | FetchRow,
        crops: tuple[Crop, ...] = (),
    ) -> None:
        """A session's next piece of work; from any thread."""
        self._thread.post(partial(self.take, client, effect, crops))

    def close(self, client: Client[Cache]) -> None:
        """Drop a session's work and give its cache back to the target; from any thread."""
        self._thread.post(partial(self._end, client))

    # --- on the model thread ------------------------------------------------------------------

    def take(
        self,
        client: Client[Cache],
        effect: Prefill | Forward | FetchRow,
        crops: tuple[Crop, ...] = (),
    ) -> None:
        """As `submit`, on the model thread."""
        self._work.append(Work(client, effect, crops, next(self._numbers)))
        self._go_on()

    def _go_on(self) -> None:
        """One more turn, after what has come for the thread meanwhile."""
        if self._work and not self._turn_waits:
            self._turn_waits = True
            self._thread.post(self._turn)

    def _end(self, client: Client[Cache]) -> None:
        for work in [work for work in self._work if work.client is client]:
            self._work.remove(work)
        self._target.close(client.cache)

    def _turn(self) -> None:
        """One pass. What has come meanwhile is taken in before the next."""
        self._turn_waits = False
        batch = self._schedule()
        if batch:
            self._run(batch)
        self._postprocess()
        self._go_on()

    def _schedule(self) -> Batch[Cache]:
        """A row for each session with work; then trees, and windows, each as much as the others
        until it has all; then prompts."""
        passes = [work for work in self._work if isinstance(work.effect, Forward)]
        for work in self._able_to_begin():
            self._guarded(work, partial(work.begin, self._target, BUDGET // max(len(passes), 1)))
        batch = {work: work.num_left if work.whole else 1 for work in self._work if work.num_left}
        windows = [work for work in batch if work.begun is not None]
        budget = max(0, BUDGET - sum(batch[work] - 1 for work in windows))
        while budget and (wanting := [work for work in windows if batch[work] < work.num_left]):
            share = max(1, budget // len(wanting))
            for work in wanting:
                more = min(share, work.num_left - batch[work], budget)
                batch[work] += more
                budget -= more
        prompts = [work for work in batch if work.begun is None]
        chunk = self._costs.chunk(sum(batch[work] for work in windows)) if prompts else 0
        for index, work in enumerate(prompts):
            batch[work] = min(work.num_left, max(1, chunk // (len(prompts) - index)))
            chunk -= batch[work]
        self._work.rotate(-1)  # the first of this pass is the last of the next
        return batch

    def _able_to_begin(self) -> list[Work[Cache]]:
        """New work. That of a session which was opened again while older work of it goes on waits
        for the end of that: it counts on what the older one leaves in the cache."""
        able: dict[int, Work[Cache]] = {}
        for work in sorted(self._work, key=lambda work: work.number):
            able.setdefault(id(work.client), work)
        return [work for work in able.values() if work.is_new]

    def _run(self, batch: Batch[Cache]) -> None:
        """One pass. Where it fails, the segments run one by one, and a failure ends the session it
        belongs to."""
        segments = {work: work.segment(num_rows) for work, num_rows in batch.items()}
        lengths = {work: self._target.length(work.client.cache) for work in batch}
        began_ms = now_ms()
        self._gauge.begin()
        try:
            rows = self._target.run(list(segments.values()))
        except Exception as error:  # noqa: BLE001 - engines raise what they like
            if len(batch) == 1:
                self._drop(next(iter(batch)), error)
                return
            for work, length in lengths.items():
                held = self._target.length(work.client.cache)
                self._target.keep(work.client.cache, min(length, held))
            for work, num_rows in batch.items():
                self._run({work: num_rows})
            return
        took_ms = now_ms() - began_ms
        self._gauge.end(took_ms / 1e3)
        num_rows = sum(batch.values())
        self._costs.add(num_rows, took_ms)
        self._passed(len(batch), num_rows, took_ms)
        for (work, segment), given in zip(segments.items(), rows, strict=True):
            work.add(segment, given, num_rows, took_ms)

    def _postprocess(self) -> None:
        """Events to the sessions whose work is complete."""
        for work in [work for work in self._work if not work.is_new and not work.num_left]:
            event = self._guarded(work, partial(work.event, self._target))
            if event is not None:
                self._work.remove(work)
                work.client.completed(event)

    def _guarded(self, work: Work[Cache], step: Callable[[], T]) -> T | None:
        try:
            return step()
        except Exception as error:  # noqa: BLE001 - as above
            self._drop(work, error)
            return None

    def _drop(self, work: Work[Cache], error: Exception) -> None:
        self._work.remove(work)
        self._failed(work.client, error)
