"""Real process trees on tiny random models: everything real but the size of the weights."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch.stack import Stack, StackOptions
from tests.models.tiny import save_tiny

LEASE_S = 1.0
NOISE = 0.1


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a draft that agrees on many tokens: the target's weights with some noise."""
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny(folder / "target")
    draft = save_tiny(folder / "draft")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(draft)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(NOISE * weight.std() * torch.randn_like(weight))
    model.save_pretrained(draft)
    return target, draft


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
