"""A real stack on the default pair, and programs of others that speak OpenAI's API, unmodified.

They have environments of their own: `make setup-clients` makes them under `.venv-clients`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engines.torch.loading import load_tokenizer
from engines.torch.sources import resolve_source
from launch.python import ROOT
from launch.stack import Stack, StackOptions

ENVIRONMENTS = ROOT / ".venv-clients"
_FIRST_PORT = 8100
_PATIENCE_S = 280.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """The default pair with a gateway."""
    async with Stack(StackOptions(gateway_port=_FIRST_PORT), log=lambda _: None) as running:
        yield running


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default target's tokenizer as a directory, as the clients want it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer(resolve_source("default")).save_pretrained(folder)
    return folder


def program(environment: str, name: str) -> str:
    """A command of one of the environments; without it the test is skipped."""
    path = ENVIRONMENTS / environment / "bin" / name
    if not path.exists():
        pytest.skip(f"needs: make setup-clients ({path} is missing)")
    return str(path)


async def run(*command: str, **env: Any) -> str:
    """Run a client to its end; what it wrote, errors included.

    Raises:
        AssertionError: its exit status is not 0.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        stdin=asyncio.subprocess.DEVNULL, env=env or None,
    )  # fmt: skip
    try:
        async with asyncio.timeout(_PATIENCE_S):
            written, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    text = written.decode(errors="replace")
    assert process.returncode == 0, text[-4000:]
    return text
