"""Missing workers, outages, limits, keys, health and metrics, as an HTTP client sees them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bus.store import Role, Store, WorkerRecord
from gateway.keys import KeyFile
from tests.gateway.calls import CHAT, HI, JSON, error
from tests.gateway.conftest import MakeGateway, until
from tests.gateway.scripted import ScriptedEdge


async def test_without_workers_it_is_503_with_the_reason(
    http: httpx2.AsyncClient, store: Store
) -> None:
    response = await http.post(CHAT, json=HI)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert error(response)["code"] == "no_workers"
    assert "no cloud worker is registered and no edge worker" in error(response)["message"]
    health = await http.get("/health")
    assert health.status_code == 503
    assert health.json() == {
        "status": "unavailable", "live": True, "ready": False,
        "reasons": ["no cloud worker is registered", "no edge worker is registered"],
    }  # fmt: skip
    assert (await http.get("/health/live")).status_code == 200
    assert (await http.get("/v1/models")).json() == {"object": "list", "data": []}


async def test_an_edge_of_another_tokenizer_is_no_edge(
    make_gateway: MakeGateway, store: Store
) -> None:
    for role, digest in ((Role.CLOUD, "one"), (Role.EDGE, "other")):
        await store.registry.beat(
            WorkerRecord(worker_id=role, role=role, boot="b", tokenizer_digest=digest)
        )
    async with httpx2.AsyncClient(base_url=await make_gateway()) as http:
        response = await http.get("/health/ready")
    assert response.json()["reasons"] == ["no edge worker has the tokenizer of a cloud worker"]


async def test_without_redis_it_serves_and_says_so(make_gateway: MakeGateway) -> None:
    url = await make_gateway(redis_url="redis://127.0.0.1:1/0")
    async with httpx2.AsyncClient(base_url=url, timeout=30) as http:
        response = await http.post(CHAT, json=HI)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert error(response)["code"] == "queue_unavailable"
        health = await http.get("/health")
        assert health.json()["reasons"] == ["the queue (Redis) does not answer"]
        assert (await http.get("/health/live")).status_code == 200


async def test_a_full_queue_is_429_and_what_was_queued_is_cancelled(
    edge: ScriptedEdge, make_gateway: MakeGateway
) -> None:
    edge.held = asyncio.Event()
    url = await make_gateway(max_queue=2)
    async with httpx2.AsyncClient(base_url=url) as http:
        response = await http.post(CHAT, json={**HI, "n": 3})
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert error(response)["code"] == "queue_full"
    waiting = await edge.store.queue.depth()
    while waiting.length:
        waiting = await edge.store.queue.depth()


async def test_more_streams_than_allowed_are_429(
    edge: ScriptedEdge, make_gateway: MakeGateway
) -> None:
    edge.held = asyncio.Event()
    url = await make_gateway(max_streams=1)
    async with httpx2.AsyncClient(base_url=url) as http:
        first = asyncio.create_task(http.post(CHAT, json=HI))
        await until(lambda: bool(edge.seen))
        response = await http.post(CHAT, json=HI)
        assert response.status_code == 429
        assert error(response)["code"] == "too_many_streams"
        edge.held.set()
        assert (await first).status_code == 200
        assert (await http.post(CHAT, json=HI)).status_code == 200


async def test_a_request_that_takes_too_long_is_cancelled_and_504(
    edge: ScriptedEdge, make_gateway: MakeGateway
) -> None:
    edge.held = asyncio.Event()
    url = await make_gateway(request_timeout_s=0.3)
    async with httpx2.AsyncClient(base_url=url) as http:
        response = await http.post(CHAT, json=HI)
        assert response.status_code == 504
        assert error(response)["code"] == "timeout"
        await until(lambda: edge.cancelled == [edge.seen[0].id])
        response = await http.post(CHAT, json={**HI, "stream": True})
    events = [line for line in response.text.splitlines() if line]
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert events[-1] == "data: [DONE]"


async def test_a_request_given_up_by_the_queue_is_500(
    edge: ScriptedEdge, http: httpx2.AsyncClient
) -> None:
    edge.error = "given up after 3 deliveries: every edge that took this request stopped"
    response = await http.post(CHAT, json=HI)
    assert response.status_code == 500
    assert "given up after 3" in error(response)["message"]


async def test_a_request_cancelled_elsewhere_is_an_error(
    edge: ScriptedEdge, http: httpx2.AsyncClient
) -> None:
    edge.held = asyncio.Event()
    asking = asyncio.create_task(http.post(CHAT, json=HI))
    await until(lambda: bool(edge.seen))
    await edge.store.queue.cancel(edge.seen[0].id)
    response = await asking
    assert (response.status_code, error(response)["code"]) == (500, "cancelled")


async def test_a_long_body_is_413(edge: ScriptedEdge, make_gateway: MakeGateway) -> None:
    async with httpx2.AsyncClient(base_url=await make_gateway(max_body_bytes=1024)) as http:
        long = {**HI, "user": "x" * 1024}
        response = await http.post(CHAT, json=long)
        assert (response.status_code, error(response)["code"]) == (413, "request_too_large")

        async def pieces() -> Any:
            for byte in json.dumps(long).encode():
                yield bytes([byte])

        response = await http.post(CHAT, content=pieces(), headers=JSON)
        assert (response.status_code, error(response)["code"]) == (413, "request_too_large")
        assert (await http.post(CHAT, json=HI)).status_code == 200


async def test_keys_are_asked_for_and_may_change_while_it_runs(
    edge: ScriptedEdge, make_gateway: MakeGateway, tmp_path: Path
) -> None:
    file = KeyFile(tmp_path / "keys")
    key = file.add("alice")
    async with httpx2.AsyncClient(base_url=await make_gateway(api_keys_file=file.path)) as http:
        for wrong in ({}, {"Authorization": "Bearer nope"}, {"Authorization": f"Basic {key}"}):
            response = await http.post(CHAT, json=HI, headers=wrong)
            assert (response.status_code, error(response)["code"]) == (401, "invalid_api_key")
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/health")).status_code == 200
        right = {"Authorization": f"Bearer {key}"}
        assert (await http.post(CHAT, json=HI, headers=right)).status_code == 200
        assert edge.seen[0].client == "alice"
        other = file.add("bob")
        file.remove("alice")
        assert (await http.post(CHAT, json=HI, headers=right)).status_code == 401
        response = await http.post(CHAT, json=HI, headers={"Authorization": f"Bearer {other}"})
        assert response.status_code == 200


async def test_the_rate_of_one_key_is_limited(
    edge: ScriptedEdge, make_gateway: MakeGateway, tmp_path: Path
) -> None:
    file = KeyFile(tmp_path / "keys")
    alice, bob = file.add("alice"), file.add("bob")
    url = await make_gateway(api_keys_file=file.path, requests_per_minute=1)
    async with httpx2.AsyncClient(base_url=url) as http:
        statuses = []
        for key in (alice, alice, bob):
            headers = {"Authorization": f"Bearer {key}"}
            response = await http.post(CHAT, json=HI, headers=headers)
            statuses.append(response.status_code)
            if response.status_code == 429:
                assert error(response)["code"] == "rate_limit_exceeded"
                assert 0 < int(response.headers["retry-after"]) <= 60
    assert statuses == [200, 429, 200]


async def test_other_origins_are_allowed_only_where_set(
    edge: ScriptedEdge, make_gateway: MakeGateway, tmp_path: Path
) -> None:
    file = KeyFile(tmp_path / "keys")
    file.add("alice")
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    for options, allowed in (
        ({}, None),
        ({"cors_origins": ("https://app.example",)}, "https://app.example"),
    ):
        url = await make_gateway(api_keys_file=file.path, **options)
        async with httpx2.AsyncClient(base_url=url) as http:
            response = await http.options(CHAT, headers=asked)
            assert response.headers.get("access-control-allow-origin") == allowed


@pytest.mark.parametrize(
    ("options", "host", "origin", "status"),
    [
        ({}, "evil.example", "http://evil.example", 403),
        ({}, "127.0.0.1.evil.example:8000", "http://127.0.0.1.evil.example:8000", 403),
        ({}, "[evil", "null", 403),
        ({}, "evil.example", None, 200),
        ({}, "localhost:8000", "http://localhost:3000", 200),
        ({}, "[::1]:8000", "http://[::1]:8000", 200),
        ({}, "192.168.0.7", "http://app.example", 200),
        ({"cors_origins": ("http://app.example",)}, "app.example", "http://app.example", 200),
        ({"cors_origins": ("*",)}, "app.example", "http://app.example", 200),
    ],
)
async def test_without_keys_a_page_whose_host_name_leads_here_is_refused(
    edge: ScriptedEdge,
    make_gateway: MakeGateway,
    options: dict[str, Any],
    host: str,
    origin: str | None,
    status: int,
) -> None:
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    async with httpx2.AsyncClient(base_url=await make_gateway(**options)) as http:
        response = await http.post(CHAT, json=HI, headers=headers)
    assert response.status_code == status
    if status == 403:
        assert error(response)["code"] == "origin_not_allowed"
        assert edge.seen == []


async def test_metrics(edge: ScriptedEdge, http: httpx2.AsyncClient) -> None:
    edge.held = asyncio.Event()
    asking = asyncio.create_task(http.post(CHAT, json={**HI, "user": "ann"}))
    await until(lambda: bool(edge.seen))
    text = ""
    while "e2sci:num_requests_running 1.0" not in text:
        text = (await http.get("/metrics")).text
    edge.held.set()
    await asking
    await http.get("/v1/nothing")
    expected = {
        "e2sci:num_requests_running 0.0",
        "e2sci:num_requests_waiting 0.0",
        'e2sci:request_success_total{finished_reason="stop"} 1.0',
        "e2sci:prompt_tokens_total 7.0",
        "e2sci:generation_tokens_total 5.0",
        "e2sci:time_to_first_token_seconds_count 1.0",
        "e2sci:inter_token_latency_seconds_count 2.0",
        "e2sci:e2e_request_latency_seconds_count 1.0",
        f'e2sci:http_requests_total{{method="POST",route="{CHAT}",status="200"}} 1.0',
        'e2sci:http_requests_total{method="GET",route="other",status="404"} 1.0',
    }
    async with asyncio.timeout(30):
        while True:  # a request is counted after its response has left
            response = await http.get("/metrics")
            if expected <= set(response.text.splitlines()):
                break
    assert "ann" not in response.text
    assert edge.seen[0].id not in response.text


async def test_a_hundred_streams_at_once_are_not_mixed_up(
    edge: ScriptedEdge, http: httpx2.AsyncClient
) -> None:
    async def ask(number: int) -> tuple[int, str, str]:
        body = {**HI, "seed": number, "stream": True}
        async with http.stream("POST", CHAT, json=body) as response:
            lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        [name] = {chunk["id"] for chunk in chunks}
        return number, name, text

    answers = await asyncio.gather(*(ask(number) for number in range(100)))
    by_seed = {request.seed: f"chatcmpl-{request.id}" for request in edge.seen}
    assert {(number, name) for number, name, _ in answers} == set(by_seed.items())
    assert {text for _, _, text in answers} == {"Hello there, world!"}
