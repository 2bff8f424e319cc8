"""Helpers of process tests: a log that is kept, and waiting without a clock of our own."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable


class KeptLog:
    """A `launch.supervisor.Log` that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, line: str) -> None:
        name, _, text = line.partition(" | ")
        self.lines.append((name, text))

    def of(self, name: str) -> list[str]:
        return [line for who, line in self.lines if who == name]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`; pytest's time limit is what ends a wait that nothing fulfils."""
    while not condition():  # noqa: ASYNC110 - conditions of the operating system have no event
        await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether the process lives; a zombie nobody has collected does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_gone(pids: list[int]) -> None:
    """Wait until none of the processes lives."""
    while any(is_running(pid) for pid in pids):
        time.sleep(0.02)
