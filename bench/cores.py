"""Who runs on which core, and who goes first: edge and cloud have one core each; a middle worker
runs on the edge's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch

from launch.stack import Stack

_AHEAD = -10
_MODELS = ("edge", "middle", "cloud")
_CORES = os.sched_getaffinity(0)


def pin(stack: Stack, others: bool = False) -> None:
    """Edge and middle workers to the first core, cloud workers to the last.

    Args:
        others: everything else, this process too, to the first core, so that the cloud has one to
            itself; or where it likes.
    """
    for process in stack.processes:
        cloud = process.name.startswith("cloud")
        if others or cloud or process.name.startswith(("edge", "middle")):
            pin_process(process.pid, last=cloud)
    if others:
        pin_process(os.getpid(), last=False)


def pin_process(pid: int, last: bool) -> None:
    """A process to the first core, or to the last."""
    for thread in psutil.Process(pid).threads():  # new ones inherit it
        os.sched_setaffinity(thread.id, {max(_CORES) if last else min(_CORES)})


def put_models_last(stack: Stack) -> bool:
    """Let link, Redis, controller and this process go before the models on their cores.

    Returns:
        Whether this user may do that; else all share alike.
    """
    light = [p.pid for p in stack.processes if not p.name.startswith(_MODELS)]
    with suppress(PermissionError):
        for pid in (os.getpid(), *light):
            for thread in psutil.Process(pid).threads():
                os.setpriority(os.PRIO_PROCESS, thread.id, _AHEAD)
        return True
    return False


@contextmanager
def one_core(last: bool = False) -> Iterator[None]:
    """This thread, and torch in it, on one core: the first, or the last."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(cores) if last else min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
