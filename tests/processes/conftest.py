"""A real process tree on tiny random models: everything real but the size of the weights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from engines.torch.converted import load_integer
from launch.stack import Stack, StackOptions
from tests.engines.tiny import save_tiny

LEASE_S = 1.0
PASS_MS = "6"
"""Tiny targets take that of a pass, so that an answer lasts long enough to be disturbed."""
NOISE = 0.1


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a draft that agrees on many tokens: the target's weights with some noise."""
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny(folder / "target")
    draft = save_tiny(folder / "draft")
    add_noise(draft, NOISE)
    return target, draft


@pytest.fixture(scope="session")
def integer_pair(
    tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The tiny pair converted to int8: workers need not import transformers' models for it, which
    takes longer than everything else that they import but torch."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("converted")))
        target, draft = (converted(model) for model in tiny_pair)
    return target, draft


def converted(model: Path) -> Path:
    found = load_integer(str(model))
    assert found is not None
    return Path(found[0].location)


def add_noise(folder: Path, share: float) -> None:
    """Add noise to a saved model's weights, of `share` of their standard deviation."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(share * weight.std() * torch.randn_like(weight))
    model.save_pretrained(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(integer_pair: tuple[Path, Path]) -> AsyncIterator[Stack]:
    """Valkey, controller, one cloud worker and two edge workers, with short leases.

    One for all tests of a module: a worker takes seconds of CPU to import torch.
    """
    target, draft = integer_pair
    options = StackOptions(target=str(target), draft=str(draft), dtype="int8", threads=1, edge=2)
    env = {"E2SCI_LEASE_S": str(LEASE_S), "OMP_NUM_THREADS": "1", "E2SCI_LEAST_PASS_MS": PASS_MS}
    async with Stack(options, log=lambda _: None, env=env) as running:
        yield running
