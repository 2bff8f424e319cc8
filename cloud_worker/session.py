"""One session in the cloud worker's shell: runs the effects of `decoding.cloud` in order.

Model work goes to the worker's one model thread, a chunk of prefill or one pass at a time, so
sessions take turns. A crop rides along with the next job: no torch call is made in a coroutine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import Any

from bus.messages import Message, OpenSession
from cloud_worker.target_model import TargetCache, TargetModel
from decoding import cloud
from decoding.cloud_events import (
    Crop,
    Effect,
    Event,
    FetchRow,
    Forward,
    FullRowReady,
    Prefill,
    Prefilled,
    Report,
    ReportWindow,
    RowsReady,
    Send,
)
from decoding.methods import Method
from decoding.verification import window_report

PREFILL_CHUNK = 256


def now_ms() -> float:
    """The shell's monotonic clock in milliseconds."""
    return time.monotonic() * 1e3


class CloudSession:
    """State machine, cache and pending jobs of one session.

    Args:
        send: delivers a message to an edge, given its id.
        report: delivers a message to the controller.
        failed: told about an exception that a model job raised.
    """

    def __init__(
        self,
        model: TargetModel,
        executor: Executor,
        send: Callable[[str, Message], None],
        report: Callable[[Message], None],
        failed: Callable[[CloudSession, Exception], None],
    ) -> None:
        self._model = model
        self._executor = executor
        self._send = send
        self._report = report
        self._failed = failed
        self._cache: TargetCache
        self._crop_to: int | None = None
        self._turn = asyncio.Lock()
        self._jobs: set[asyncio.Task[None]] = set()
        self.state: cloud.CloudState
        self.last_used_ms = now_ms()

    def begin(self, message: OpenSession, method: Method, name: str, limits: cloud.Limits) -> None:
        """Open; the message has passed `cloud.check_open`."""
        self.state, effects = cloud.begin(message, method, name, limits)
        self._cache = self._model.open(self.state.sampling)
        self._run(effects)

    def handle(self, event: Event) -> None:
        """One event in, its effects out."""
        self.last_used_ms = now_ms()
        self.state, effects = cloud.step(self.state, event)
        self._run(effects)

    @property
    def jobs(self) -> frozenset[asyncio.Task[None]]:
        """Model jobs that run or wait."""
        return frozenset(self._jobs)

    def close(self) -> None:
        """Forget pending jobs; a pass that runs ends by itself and nobody hears of it."""
        for job in self._jobs:
            job.cancel()

    def _run(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case Send(message):
                    self._send(self.state.edge, message)
                case Report(message):
                    self._report(message)
                case ReportWindow():
                    asyncio.get_running_loop().call_soon(self._report_window, effect)
                case Crop(length):
                    pending = self._crop_to
                    self._crop_to = length if pending is None else min(pending, length)
                case Prefill():
                    self._start(partial(self._prefill, effect, self._take_crop()))
                case Forward():
                    self._start(partial(self._forward, effect, self._take_crop()))
                case FetchRow():
                    self._start(partial(self._fetch_row, effect))

    def _report_window(self, effect: ReportWindow) -> None:
        state = self.state
        self._report(
            window_report(
                effect.verification, effect.feedback, state.edge, state.client, state.method.name
            )
        )

    def _take_crop(self) -> int | None:
        crop_to, self._crop_to = self._crop_to, None
        return crop_to

    def _start(self, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Jobs of one session run in the order they were asked for (asyncio.Lock is fair)."""
        task = asyncio.create_task(self._in_turn(job))
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def _in_turn(self, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            async with self._turn:
                await job()
        except Exception as error:  # noqa: BLE001 - whatever a model raises ends this session only
            self._failed(self, error)

    async def _in_model_thread(self, job: Callable[..., Any], *args: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, job, *args)

    async def _prefill(self, effect: Prefill, crop_to: int | None) -> None:
        chunks = [
            effect.tokens[i : i + PREFILL_CHUNK]
            for i in range(0, len(effect.tokens), PREFILL_CHUNK)
        ] or [()]
        for chunk in chunks:
            await self._in_model_thread(self._prefill_chunk, chunk, crop_to)
            crop_to = None
        self.handle(Prefilled(effect.job, now_ms()))

    def _prefill_chunk(self, chunk: tuple[int, ...], crop_to: int | None) -> None:
        self._crop(crop_to)
        self._model.prefill(self._cache, chunk)

    async def _forward(self, effect: Forward, crop_to: int | None) -> None:
        rows, verify_ms = await self._in_model_thread(self._pass, effect, crop_to)
        self.handle(RowsReady(effect.job, tuple(rows), verify_ms, now_ms()))

    def _pass(self, effect: Forward, crop_to: int | None) -> Any:
        self._crop(crop_to)
        return self._model.forward(self._cache, effect.feed, effect.row_ids)

    async def _fetch_row(self, effect: FetchRow) -> None:
        probs = await self._in_model_thread(self._model.full_row, self._cache, effect.index)
        self.handle(FullRowReady(effect.job, probs, now_ms()))

    def _crop(self, crop_to: int | None) -> None:
        if crop_to is not None:
            self._model.crop(self._cache, min(crop_to, self._cache.length))
