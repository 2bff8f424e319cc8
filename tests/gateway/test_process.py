"""`python -m gateway` as a process: signals, exit statuses, and what it says."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import httpx2
import pytest

from bus.settings import BusSettings
from launch.python import module_command, module_env
from tests.gateway.calls import TRACE
from tests.gateway.conftest import until
from tests.gateway.scripted import MODEL, ScriptedEdge

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}


async def start(settings: BusSettings, *flags: str, **env: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *module_command("gateway"),
        *("--redis-url", settings.redis_url, "--key-prefix", settings.key_prefix, *flags),
        env={**os.environ, **module_env(), **env},
        stderr=PIPE,
    )


async def url_of(process: Process) -> str:
    assert process.stderr is not None
    while line := (await process.stderr.readline()).decode():
        if found := re.search(r"OpenAI API at (http://\S+)/v1", line):
            return found[1]
    pytest.fail("the gateway did not start")


async def test_a_signal_lets_answers_finish_and_cancels_the_rest(
    edge: ScriptedEdge, bus_settings: BusSettings
) -> None:
    edge.held = asyncio.Event()
    process = await start(bus_settings, "--port", "0", "--drain-s", "1")
    async with (
        httpx2.AsyncClient(base_url=await url_of(process), timeout=30) as http,
        http.stream("POST", "/v1/chat/completions", json=BODY) as response,
    ):
        lines = response.aiter_lines()
        assert json.loads((await anext(lines)).removeprefix("data: "))["model"] == MODEL
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    await until(lambda: edge.cancelled == [edge.seen[0].id])


async def test_a_request_that_does_not_come_whole_loses_its_connection(
    edge: ScriptedEdge, bus_settings: BusSettings
) -> None:
    process = await start(bus_settings, "--port", "0", "--client-timeout-s", "1")
    url = httpx2.URL(await url_of(process))

    async def answer_to(*pieces: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(url.host, url.port)
        received = b""
        for number, piece in enumerate(pieces):
            received += await reader.readuntil(b"}") if number else b""
            writer.write(piece)
        received += await reader.read()  # up to the end of the connection
        writer.close()
        return received

    answers = await asyncio.gather(
        answer_to(b""),
        answer_to(b"POST /v1/chat/comp"),
        answer_to(HEAD + b"X: "),
        answer_to(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /hea"),
        answer_to(HEAD + b"Content-Length: 100\r\n\r\n{"),
        answer_to(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"),
    )
    expected = [b"", b"", b"", b"200", b"408", b"408"]
    assert [answer[9:12] for answer in answers] == expected
    process.terminate()
    assert await process.wait() == 0
    assert edge.seen == []


async def test_a_client_that_takes_nothing_of_its_answer_is_gone(
    edge: ScriptedEdge, bus_settings: BusSettings
) -> None:
    edge.words = ["word" * 5_000] * 4_000
    process = await start(bus_settings, "--port", "0", "--client-timeout-s", "1")
    url = httpx2.URL(await url_of(process))
    _, writer = await asyncio.open_connection(url.host, url.port, limit=1024)
    body = json.dumps({**BODY, "max_tokens": 4_000}).encode()
    writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert process.stderr is not None
    line = ""
    while "gateway.access" not in line:
        line = (await process.stderr.readline()).decode()
    assert " 499 " in line
    writer.close()
    process.terminate()
    assert await process.wait() == 0


async def test_two_gateways_serve_one_queue(
    edge: ScriptedEdge, bus_settings: BusSettings, tmp_path: Path
) -> None:
    processes = [await start(bus_settings, "--port", "0") for _ in range(2)]
    for process in processes:
        async with httpx2.AsyncClient(base_url=await url_of(process), timeout=30) as http:
            response = await http.post("/v1/chat/completions", json=BODY)
            assert response.text.endswith("data: [DONE]\n\n")
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
    assert len(edge.seen) == 2


async def test_the_log_as_json_names_trace_and_request(
    edge: ScriptedEdge, bus_settings: BusSettings
) -> None:
    process = await start(bus_settings, "--port", "0", E2SCI_LOG_FORMAT="json")
    trace = {"traceparent": TRACE}
    async with httpx2.AsyncClient(base_url=await url_of(process), timeout=30) as http:
        await http.post("/v1/chat/completions", json=BODY, headers=trace)
    assert process.stderr is not None
    line = json.loads(await process.stderr.readline())
    assert (line["logger"], line["process"]) == ("gateway.access", "gateway")
    assert line["trace_id"] == TRACE.split("-")[1]
    assert line["request"] == edge.seen[0].id
    process.terminate()
    assert await process.wait() == 0


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--host", "0.0.0.0"], 2, "set api_keys_file"),
        (["--api-keys-file", "/none"], 2, "cannot be read"),
        (["--port", "70000"], 2, "settings: port"),
        (["--host", "192.0.2.1", "--insecure"], 1, "cannot listen on 192.0.2.1"),
    ],
)
async def test_what_cannot_start_says_why(
    bus_settings: BusSettings, flags: list[str], status: int, words: str
) -> None:
    process = await start(bus_settings, *flags)
    _, said = await process.communicate()
    assert process.returncode == status
    assert words in said.decode()
    assert "Traceback" not in said.decode()
