"""GuideLLM, a load generator, against the gateway: all requests succeed, as many as it counts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.stack import Stack
from tests.clients.conftest import program, run

pytestmark = [pytest.mark.clients, pytest.mark.asyncio(loop_scope="module")]


async def test_guidellm_counts_what_it_asked_for(
    stack: Stack, tokenizer: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    await run(
        program("guidellm", "guidellm"), "run", "--disable-console",
        "--backend", f"kind=openai_http,target={stack.gateway_url},model=default",
        "--profile", "kind=concurrent,streams=4",
        "--constraint", "kind=max_requests,count=12",
        "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
        "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=12",
        "--output", f"kind=json,path={report}", **os.environ, HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "hub"),
    )  # fmt: skip
    [benchmark] = json.loads(report.read_text("utf-8"))["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 12
    assert totals["errored"] == 0
