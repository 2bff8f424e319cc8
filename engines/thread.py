"""The one thread that runs a worker's model, and how sessions take turns on it.

A session's jobs run one at a time, in the order they were asked for; sessions take turns job by
job. Results come back to the event loop by callback, and the thread takes its jobs from a plain
queue: an executor's futures, a task or a lock for each job would cost a window more than its
messages do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")
PREFILL_CHUNK = 256
"""Tokens of a prompt that run before other sessions get their turn."""
_Job = tuple[Callable[[], Any], Callable[[Any], None]]
_Queue = SimpleQueue[Callable[[], None]]


class ModelThread:
    """A single thread for all torch calls of a process. Use it within one event loop, and close
    it: the process does not end before.

    Args:
        num_threads: torch's own threads for one operation; 0 leaves its default.
    """

    def __init__(self, num_threads: int = 0) -> None:
        self._jobs: _Queue = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(num_threads,), name="model")
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes jobs."""
        return self._thread.is_alive() and not self._closed

    async def call(self, job: Callable[..., T], *args: object) -> T:
        """Run `job` there and wait for it; for loading a model."""
        future: Future[T] = Future()
        self._jobs.put(partial(_fulfil, future, job, args))
        return await asyncio.wrap_future(future)

    def post(self, job: Callable[[], None]) -> None:
        """Run `job` there after what was posted before; what it raises is logged. From any
        thread."""
        self._jobs.put(job)

    def turns(self, failed: Callable[[Exception], None]) -> Turns:
        """A queue for one session's jobs; `failed` gets what a job raises."""
        return Turns(self._jobs, failed)

    def close(self) -> None:
        """Drop jobs that wait; the one that runs ends by itself."""
        self._closed = True
        self._jobs.put(lambda: None)

    def _run(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads or torch.get_num_threads())
        while not self._closed:
            _logged(self._jobs.get())


class Turns:
    """One session's jobs."""

    def __init__(self, jobs: _Queue, failed: Callable[[Exception], None]) -> None:
        self._jobs = jobs
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Job] = deque()
        self._running = False
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return not self._idle.is_set()

    async def wait_idle(self) -> None:
        """Return once no job runs or waits."""
        await self._idle.wait()

    def submit(self, job: Callable[[], T], done: Callable[[T], None]) -> None:
        """Run `job` on the model thread after this session's earlier jobs, then `done` here."""
        if self._closed:
            return
        self._waiting.append((job, done))
        self._idle.clear()
        if not self._running:
            self._start()

    def prefill(
        self,
        tokens: tuple[int, ...],
        crop_to: int | None,
        run: Callable[[tuple[int, ...], int | None], None],
    ) -> tuple[tuple[int, ...], int | None]:
        """Submit `run(chunk, crop_to)` for all chunks of a long prompt but its last.

        Only the first job crops. Returns the tokens and the crop that are left for the last.
        """
        while len(tokens) > PREFILL_CHUNK:
            self.submit(partial(run, tokens[:PREFILL_CHUNK], crop_to), _nothing)
            tokens, crop_to = tokens[PREFILL_CHUNK:], None
        return tokens, crop_to

    def close(self, last: Callable[[], None] | None = None) -> None:
        """Forget jobs that wait. One that runs ends by itself, and its result is discarded.

        Args:
            last: runs on the model thread once the session's other jobs have ended, at the first
                call only. What it raises is logged.
        """
        if last is not None and not self._closed:
            self._jobs.put(partial(_logged, last))  # after the one that runs, as jobs keep order
        self._closed = True
        self._waiting.clear()

    def _start(self) -> None:
        job, done = self._waiting.popleft()
        self._running = True
        self._jobs.put(partial(self._run, job, done))

    def _run(self, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """On the model thread: the job, and its result to the event loop if that still lives."""
        try:
            tell, result = done, job()
        except Exception as error:  # noqa: BLE001 - whatever is raised ends this session only
            tell, result = self._failed, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has left
            self._loop.call_soon_threadsafe(self._finish, tell, result)

    def _finish(self, tell: Callable[[Any], None], result: Any) -> None:
        self._running = False
        if self._waiting:
            self._start()
        else:
            self._idle.set()
        if self._closed:
            return
        try:
            tell(result)
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(error)


def _fulfil(future: Future[T], job: Callable[..., T], args: tuple[object, ...]) -> None:
    try:
        future.set_result(job(*args))
    except BaseException as error:  # noqa: BLE001 - raised again where it is awaited
        future.set_exception(error)


def _logged(job: Callable[[], None]) -> None:
    try:
        job()
    except Exception:
        log.exception("a job of the model thread failed")


def now_ms() -> float:
    """The shells' monotonic clock in milliseconds."""
    return time.monotonic() * 1e3


def _nothing(_: None) -> None:
    """A chunk in the middle of a prompt has run: nothing follows from it."""
