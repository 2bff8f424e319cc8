"""The model thread: order within a session, turns between sessions, failures, closing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from engines.thread import ModelThread


@pytest.fixture
def thread() -> Iterator[ModelThread]:
    thread = ModelThread(1)
    yield thread
    thread.close()


def unexpected(error: Exception) -> None:
    raise error


async def test_all_jobs_run_on_one_other_thread(thread: ModelThread) -> None:
    here = threading.get_ident()
    first = await thread.call(threading.get_ident)
    assert first != here
    assert await thread.call(threading.get_ident) == first


async def test_a_sessions_jobs_run_in_order_and_sessions_take_turns(thread: ModelThread) -> None:
    order: list[str] = []
    gate = threading.Event()
    one, other = thread.turns(unexpected), thread.turns(unexpected)
    one.submit(gate.wait, lambda _: None)
    for number in (1, 2):
        one.submit(partial(order.append, f"one {number}"), lambda _: None)
        other.submit(partial(order.append, f"other {number}"), lambda _: None)
    gate.set()
    await one.wait_idle()
    await other.wait_idle()
    assert order == ["other 1", "one 1", "other 2", "one 2"]


async def test_a_failure_is_told_and_the_next_job_runs(thread: ModelThread) -> None:
    failures: list[Exception] = []
    results: list[int] = []
    turns = thread.turns(failures.append)
    turns.submit(lambda: 1 // 0, results.append)
    turns.submit(lambda: 7, results.append)
    await turns.wait_idle()
    assert results == [7]
    assert [type(error) for error in failures] == [ZeroDivisionError]


async def test_after_close_nobody_hears_of_anything(thread: ModelThread) -> None:
    results: list[int] = []
    gate = threading.Event()
    turns = thread.turns(unexpected)
    turns.submit(lambda: gate.wait() and 1, results.append)
    turns.submit(lambda: 2, results.append)
    assert turns.busy
    turns.close()
    turns.submit(lambda: 3, results.append)
    gate.set()
    await turns.wait_idle()
    assert results == []


async def test_the_last_job_runs_once_after_the_one_that_runs(
    thread: ModelThread, caplog: pytest.LogCaptureFixture
) -> None:
    order: list[str] = []
    gate = threading.Event()
    turns = thread.turns(unexpected)

    def runs() -> None:
        gate.wait()
        order.append("runs")

    turns.submit(runs, lambda _: None)
    turns.submit(partial(order.append, "waits"), lambda _: None)
    turns.close(partial(order.append, "last"))
    turns.close(partial(order.append, "again"))
    gate.set()
    await thread.call(lambda: None)
    assert order == ["runs", "last"]
    thread.turns(unexpected).close(lambda: order.remove("nothing"))
    await thread.call(lambda: None)  # the thread lives
    assert "a job of the model thread failed" in caplog.text
