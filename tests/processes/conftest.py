"""Real process trees on tiny random models: everything real but the size of the weights."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from launch.stack import Stack, StackOptions
from tests.models.tiny import save_tiny

LEASE_S = 1.0


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a draft that agree on some tokens: the draft is the target's first layer."""
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny(folder / "target", num_layers=3)
    return target, save_tiny(folder / "draft", num_layers=1)


@pytest.fixture
async def start_stack(
    tiny_pair: tuple[Path, Path],
) -> AsyncIterator[Callable[..., Awaitable[Stack]]]:
    """Starts a stack with the options given; stops it after the test."""
    stacks: list[Stack] = []

    async def start(**options: Any) -> Stack:
        target, draft = tiny_pair
        lines: list[str] = []
        env = {"E2SCI_LEASE_S": str(LEASE_S), "OMP_NUM_THREADS": "1"}
        stack = Stack(
            StackOptions(
                target=str(target), draft=str(draft), dtype="float32", threads=1, **options
            ),
            log=lines.append,
            env=env,
        )
        stacks.append(stack)
        await stack.start()
        return stack

    yield start
    for stack in stacks:
        await stack.stop()
