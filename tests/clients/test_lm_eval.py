"""The evaluation harness (`lm-eval`) over the gateway: generation by chat, log-likelihoods."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bus.client import Client
from launch.stack import Stack
from tests.clients.conftest import program, run

pytestmark = [pytest.mark.clients, pytest.mark.asyncio(loop_scope="module")]

TASKS = Path(__file__).with_name("tasks")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """The tasks with the absolute path of their rows, which the harness wants."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in TASKS.glob("*.yaml"):
        (folder / task.name).write_text(task.read_text("utf-8").replace("ROWS", str(TASKS)))
    return folder


async def evaluated(model: str, arguments: str, task: str, tasks: Path, *options: str) -> Any:
    """Results and samples of one run."""
    out = tasks.parent / "results"
    await run(
        program("lm-eval", "lm_eval"), "run", "--model", model, "--model_args", arguments,
        "--tasks", task, "--include_path", str(tasks), "--output_path", str(out), "--log_samples",
        *options, **os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tasks.parent / "hub"),
        OPENAI_API_KEY="none",
    )  # fmt: skip
    [results] = out.rglob("results_*.json")
    [samples] = out.rglob("samples_*.jsonl")
    lines = samples.read_text("utf-8").splitlines()
    return json.loads(results.read_text("utf-8")), [json.loads(line) for line in lines]


async def test_eight_questions_by_chat(stack: Stack, tasks: Path) -> None:
    url = f"{stack.gateway_url}/v1/chat/completions"
    arguments = f"base_url={url},model=default,num_concurrent=4,max_retries=1"
    results, samples = await evaluated(
        "local-chat-completions", arguments, "e2sci_arithmetic", tasks, "--apply_chat_template"
    )
    assert "exact_match,last-number" in results["results"]["e2sci_arithmetic"]
    assert len(samples) == 8
    async with Client(redis_url=stack.redis_url) as client:
        for sample in samples:
            [[answer]] = sample["resps"]
            question = f"Question: {sample['doc']['question']}\nAnswer:"
            expected = await client.chat(
                [{"role": "user", "content": question}], max_new_tokens=48, stop=["Question:"]
            )
            assert answer == expected.text


async def test_log_likelihoods_of_answers(stack: Stack, tasks: Path, tokenizer: Path) -> None:
    url = f"{stack.gateway_url}/v1/completions"
    arguments = (
        f"base_url={url},model=default,num_concurrent=2,max_retries=1,tokenizer={tokenizer},"
        "tokenizer_backend=huggingface,max_length=2048"
    )
    results, samples = await evaluated("local-completions", arguments, "e2sci_opposites", tasks)
    assert results["results"]["e2sci_opposites"]["acc,none"] >= 0.75
    async with Client(redis_url=stack.redis_url) as client:
        for sample in samples:
            for choice, [[found, _greedy]] in zip(
                sample["doc"]["choices"], sample["resps"], strict=True
            ):
                expected = await log_likelihood(client, sample["doc"]["question"], f" {choice}")
                assert float(found) == pytest.approx(expected, abs=1e-3)


async def log_likelihood(client: Client, context: str, answer: str) -> float:
    """Of an answer after its context, by the queue: ln p of the tokens that the answer adds."""
    before, whole = [
        (await client.generate(text, raw=True, max_new_tokens=1, logprobs=0, prompt_logprobs=True))
        for text in (context, context + answer)
    ]
    added = whole.prompt_scores[len(before.prompt_scores) :]
    assert added
    return sum(score.chosen.logprob for score in added)
