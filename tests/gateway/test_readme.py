"""The README's examples of the HTTP API, as they are printed, against a real stack."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import sys

import pytest
from markdown_it import MarkdownIt

from launch.python import ROOT
from launch.stack import Stack

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PRINTED = "http://127.0.0.1:8000"


def example(language: str, words: str) -> str:
    """The README's code block of a language that holds these words."""
    text = (ROOT / "README.md").read_text("utf-8")
    fences = [token for token in MarkdownIt().parse(text) if token.type == "fence"]
    blocks = [token.content for token in fences if token.info == language]
    [found] = [block for block in blocks if words in block]
    return found


async def run(stack: Stack, *command: str) -> str:
    words = [word.replace(PRINTED, str(stack.gateway_url)) for word in command]
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_three_lines_with_openai(stack: Stack) -> None:
    code = example("python", "from openai import OpenAI")
    assert PRINTED in code
    assert (await run(stack, sys.executable, "-c", code)).strip()


async def test_curl_streams(stack: Stack) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    written = await run(stack, *shlex.split(example("", "curl ")))
    events = [line for line in written.splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert '"object":"chat.completion.chunk"' in events[0]
