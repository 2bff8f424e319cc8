"""The openai package against a real stack on tiny models: Valkey, workers and the gateway as
processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, BadRequestError

from bus.client import Client
from bus.settings import BusSettings
from bus.store import Store
from launch.stack import GATEWAY, Stack

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

HI: list[Any] = [{"role": "user", "content": "the cat"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def openai(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{stack.gateway_url}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


async def test_a_chat_is_the_queues_own_answer_whole_and_streamed(
    stack: Stack, openai: AsyncOpenAI
) -> None:
    async with Client(redis_url=stack.redis_url) as client:
        expected = await client.chat(HI, max_new_tokens=12, temperature=0.8, seed=3)
    options: dict[str, Any] = {
        "model": "default", "messages": HI, "max_tokens": 12, "temperature": 0.8, "seed": 3,
    }  # fmt: skip
    whole = await openai.chat.completions.create(**options)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == expected.usage.prompt_tokens
    assert whole.usage.completion_tokens == len(expected.token_ids)
    assert whole.system_fingerprint == expected.usage.probe_digest
    text = ""
    async for chunk in await openai.chat.completions.create(**options, stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text == expected.text


async def test_log_probabilities_of_a_prompt_and_its_answer(openai: AsyncOpenAI) -> None:
    ids = [5, 6, 7, 8]
    options: dict[str, Any] = {"model": "default", "logprobs": 2, "echo": True, "temperature": 0}
    answer = await openai.completions.create(**options, prompt=ids, max_tokens=3)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    assert answer.usage is not None
    total = len(ids) + answer.usage.completion_tokens
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == total
    probabilities: list[float | None] = list(found.token_logprobs)
    assert probabilities[0] is None
    assert all(value is not None and value < 0 for value in probabilities[1:])
    for value, top in list(zip(probabilities, found.top_logprobs, strict=True))[len(ids) :]:
        assert top is not None
        assert value == max(top.values())  # greedy
    prompt_alone = await openai.completions.create(**options, prompt=ids, max_tokens=0)
    assert prompt_alone.choices[0].logprobs is not None
    assert prompt_alone.choices[0].logprobs.token_logprobs == probabilities[: len(ids)]


async def test_what_the_edge_refuses_is_400(openai: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError, match="there is no 'no-such-method'") as caught:
        await openai.chat.completions.create(
            model="default", messages=HI, extra_body={"e2sci": {"method": "no-such-method"}}
        )
    assert caught.value.param == "e2sci.method"


async def test_a_closed_stream_frees_the_queue(stack: Stack, openai: AsyncOpenAI) -> None:
    store = await Store.connect(BusSettings.load(redis_url=stack.redis_url))
    stream = await openai.chat.completions.create(
        model="default", messages=HI, max_tokens=400, stream=True, extra_body={"top_k": 50}
    )
    async for _ in stream:
        break
    await stream.close()
    while (await store.queue.depth()).length:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    await store.close()


async def test_a_killed_gateway_is_started_again(stack: Stack) -> None:
    process = stack.process(GATEWAY)
    os.kill(process.pid, signal.SIGKILL)
    await process.wait_started(2)
    async with httpx2.AsyncClient(base_url=stack.gateway_url or "") as http:
        while True:
            try:
                response = await http.get("/health")
            except httpx2.TransportError:
                await asyncio.sleep(0.05)
                continue
            break
    assert response.json()["ready"] is True
