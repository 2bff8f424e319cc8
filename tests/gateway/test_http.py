"""What plain HTTP clients see: errors, options that are refused, ids, streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import httpx2
import pytest

from bus.store import Store
from tests.gateway.calls import CHAT, HI, JSON, TEXT, TRACE, error, post
from tests.gateway.scripted import ScriptedEdge


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]}, {"functions": [{}]}, {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}}, {"logit_bias": {"1": 2}},
        {"presence_penalty": 0.1}, {"frequency_penalty": -1}, {"best_of": 3}, {"suffix": "x"},
        {"audio": {}}, {"modalities": ["audio"]}, {"store": True},
        {"frequency_penalty": False}, {"reasoning_effort": "high"}, {"min_p": 0.1},
        {"no_such_field": None},
    ],
)  # fmt: skip
async def test_what_is_not_supported_is_refused_by_name(
    edge: ScriptedEdge, http: httpx2.AsyncClient, field: dict[str, Any]
) -> None:
    [name] = field
    for path, body in ((CHAT, HI), ("/v1/completions", TEXT)):
        found = await post(http, {**body, **field}, path)
        assert found["message"].startswith(f"{name}: ")
        assert found["type"] == "invalid_request_error"
    assert edge.seen == []


async def test_values_without_effect_are_accepted(
    edge: ScriptedEdge, http: httpx2.AsyncClient
) -> None:
    neutral: dict[str, Any] = {
        "tools": [], "functions": None, "response_format": {"type": "text"}, "logit_bias": {},
        "presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 2, "n": 2, "store": False,
        "metadata": {"a": "b"}, "service_tier": "auto", "repetition_penalty": 1.0, "user": None,
        "stream_options": None, "top_k": -1, "stop": None, "seed": None,
    }  # fmt: skip
    echoed: dict[str, Any] = {
        "role": "assistant",
        "content": "Yes",
        "refusal": None,
        "tool_calls": [],
    }
    messages = [{"role": "user", "content": "Hi", "type": "text"}, echoed, *HI["messages"]]
    response = await http.post(CHAT, json={**HI, **neutral, "messages": messages})
    assert response.status_code == 200, response.text
    assert [message.content for message in edge.seen[0].messages] == ["Hi", "Yes", "Hi"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, None, "messages: none"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "text"),
        ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages[0]", "name"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "the assistant's"),
        ({"temperature": -1}, "temperature", "expected 0 (greedy)"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "expected 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"seed": -1}, "seed", "2**63"),
        ({"n": 17}, "n", "16"),
        ({"stop": ["x"] * 17}, "stop", "the limit is 16"),
        ({"top_logprobs": 2}, None, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"stream_options": {"include_usage": True}}, None, "stream: true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not permitted"),
        ({"e2sci": {"threshold": 1}}, "e2sci.threshold", "less than or equal to 0.69"),
        ({"e2sci": {"max_loss": 1}}, "e2sci.max_loss", "not permitted"),
        ({"e2sci": {"raw": True}}, None, "raw: messages need the chat template"),
        ({"e2sci": {"method": "no such"}}, "e2sci.method", "expected 1 … 64"),
        ({"model": "gpt-\ud800"}, "model", "does not exist"),
    ],
)
async def test_a_wrong_value_is_named(
    edge: ScriptedEdge,
    http: httpx2.AsyncClient,
    body: dict[str, Any],
    param: str | None,
    words: str,
) -> None:
    response = await http.post(CHAT, content=json.dumps({**HI, **body}), headers=JSON)
    assert response.status_code == (404 if "model" in body else 400)
    found = error(response)
    assert words in found["message"]
    if param is not None:
        assert found["param"].startswith(param)
    assert edge.seen == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": ""}, "prompt: empty"),
        ({"prompt": []}, "expected 1 … 128 prompts, got 0"),
        ({"prompt": ["a", [1]]}, "prompt: expected a text, a list of texts, a list of token ids"),
        ({"prompt": [True]}, "prompt: expected a text"),
        ({"prompt": [1] * 5000}, "prompt: 5000 tokens, the target's context holds 4096"),
        ({"prompt": [[1], []]}, "prompt: empty"),
        ({"prompt": [-1]}, "prompt: a token id is at least 0"),
        ({"prompt": ["a"] * 65, "n": 2}, "more than 128 choices"),
        ({"max_tokens": 0}, "max_tokens: expected 1"),
        ({"echo": True, "e2sci": {"raw": False}}, "echo: it needs a raw prompt"),
        ({"logprobs": 21}, "20"),
    ],
)
async def test_a_wrong_completion_is_named(
    edge: ScriptedEdge, http: httpx2.AsyncClient, body: dict[str, Any], words: str
) -> None:
    found = await post(http, {**TEXT, **body}, "/v1/completions")
    assert words in found["message"]


_MANY = 100_000


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {**HI, "messages": [{}] * _MANY}, "messages[0].role: Field required"),
        (CHAT, {**HI, "messages": [1] * _MANY}, "messages[0]: Input should be"),
        (CHAT, {**HI, "messages": [{"role": "user", "content": "x"}] * 1025}, "at most 1024 items"),
        (CHAT, {**HI, "messages": [{"role": "user", "content": [{}] * _MANY}]}, "content[0].type"),
        (CHAT, {**HI, "stop": [1] * _MANY}, "stop[0]: Input should be a valid string"),
        ("/v1/completions", {**TEXT, "prompt": [{}] * _MANY}, "prompt: expected a text"),
        ("/v1/completions", {**TEXT, "prompt": [[None]] * _MANY}, "prompt: expected a text"),
    ],
)
async def test_of_many_wrong_items_the_first_is_named_and_the_rest_is_left_unread(
    edge: ScriptedEdge, http: httpx2.AsyncClient, path: str, body: dict[str, Any], words: str
) -> None:
    found = await post(http, body, path)
    assert words in found["message"]
    assert len(found["message"]) < 500


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"model": "\xff"}', b'{"model": "x", "seed": ' + b"9" * 5000 + b"}"],
)
async def test_a_body_that_the_parser_gives_up_on_is_not_json(
    http: httpx2.AsyncClient, body: bytes
) -> None:
    response = await http.post(CHAT, content=body, headers=JSON)
    assert response.status_code == 400
    assert error(response)["message"].startswith("the body is not JSON: not UTF-8, nested")


async def test_bodies_that_are_no_json_and_routes_that_do_not_exist(
    edge: ScriptedEdge, http: httpx2.AsyncClient
) -> None:
    response = await http.post(CHAT, content="{", headers=JSON)
    assert (response.status_code, error(response)["message"]) == (400, "the body is not JSON")
    wrong: dict[str, Any]
    for wrong in ({"content": json.dumps(HI)}, {"json": [HI]}, {"content": b"", "headers": JSON}):
        response = await http.post(CHAT, **wrong)
        assert response.status_code == 400
        assert error(response)["message"].startswith("expected a JSON object, sent with Content-")
    response = await http.get("/v1/embeddings")
    assert response.status_code == 404
    assert error(response)["message"] == "there is no GET /v1/embeddings here"
    response = await http.get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert error(response)["message"] == f"{CHAT} takes no GET"


async def test_a_user_that_is_no_identifier_is_hashed(
    edge: ScriptedEdge, http: httpx2.AsyncClient
) -> None:
    for user in ("ann", "Ann Example <ann@example.org>", "Ann Example <ann@example.org>"):
        assert (await http.post(CHAT, json={**HI, "user": user})).status_code == 200
    plain, hashed, again = (request.client for request in edge.seen)
    assert plain == "ann"
    assert hashed == again
    assert hashed.startswith("u-")
    assert "example" not in hashed


async def logged(caplog: pytest.LogCaptureFixture) -> str:
    """The only line of the access log, which is written after the response."""
    async with asyncio.timeout(30):
        while True:
            lines = [r.getMessage() for r in caplog.records if r.name == "gateway.access"]
            if lines:
                [line] = lines
                return line
            await asyncio.sleep(0.01)


async def test_request_ids_and_traces(
    edge: ScriptedEdge, http: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gateway.access")
    given = {"x-request-id": "abc-1", "traceparent": TRACE}
    response = await http.post(CHAT, json=HI, headers=given)
    assert response.headers["x-request-id"] == "abc-1"
    assert edge.seen[0].traceparent == TRACE
    line = await logged(caplog)
    assert line.startswith(f"POST {CHAT} 200 ")
    assert line.endswith(f"id abc-1 key - requests {edge.seen[0].id}")
    for wrong in ("", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "junk"):
        bad = {"x-request-id": "two words", "traceparent": wrong}
        response = await http.post(CHAT, json=HI, headers=bad)
        assert response.headers["x-request-id"] not in ("", "two words")
        assert edge.seen[-1].traceparent not in ("", wrong)


async def test_a_stream_that_waits_begins_and_sends_comments(
    http: httpx2.AsyncClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.service._HOLD_S", 0.05)
    monkeypatch.setattr("gateway.replies._IDLE_S", 0.05)
    edge = ScriptedEdge(store)
    await edge.register()
    async with http.stream("POST", CHAT, json={**HI, "stream": True}) as response:
        lines = response.aiter_lines()
        while await anext(lines) != ": waiting":
            pass
        running = asyncio.create_task(edge.run())
        rest = [line async for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    texts = [json.loads(line[6:])["choices"][0]["delta"].get("content") for line in rest[:-1]]
    assert texts == ["Hello there", ", world", "!", None]
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_usage_so_far_in_each_chunk(edge: ScriptedEdge, http: httpx2.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await http.post(CHAT, json={**HI, "stream": True, "stream_options": options})
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    usages = [json.loads(line.removeprefix("data: "))["usage"] for line in lines]
    assert [usage["completion_tokens"] for usage in usages] == [0, 2, 4, 5, 5, 5]
    assert [usage["prompt_tokens"] for usage in usages] == [0, 0, 0, 0, 0, 7]
