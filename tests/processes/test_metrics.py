"""`/metrics` and `/health` of real workers that have answered a request."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from bus.client import Client
from bus.store import WorkerRecord
from launch.stack import Stack, StackOptions

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

Samples = dict[tuple[str, tuple[str, ...]], float]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(integer_pair: tuple[Path, Path]) -> AsyncIterator[Stack]:
    """A controller, a cloud worker, a middle worker, an edge and a gateway, after one answer."""
    target, draft = map(str, integer_pair)
    options = StackOptions(
        target=target, draft=draft, middle_model=draft, dtype="int8", threads=1, middle=1,
        gateway_port=18_200,
    )  # fmt: skip
    async with Stack(options, log=lambda _: None, env={"OMP_NUM_THREADS": "1"}) as running:
        async with Client(redis_url=running.redis_url) as client:
            request = await client.submit(
                "the cat sat on the mat and", method="sd", max_new_tokens=40, raw=True
            )
            answer = await client.result(request)
        assert len(answer.token_ids) == 40
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def records(stack: Stack) -> dict[str, WorkerRecord]:
    return await stack.records()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def urls(stack: Stack) -> dict[str, str]:
    return await stack.metrics_urls()


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def samples(record: WorkerRecord) -> Samples:
    families = text_string_to_metric_families(read(record.metrics_url))
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.long
async def test_every_worker_is_ready(records: dict[str, WorkerRecord]) -> None:
    assert set(records) == {"controller", "cloud-1", "middle-1", "edge-1"}
    for record in records.values():
        await ready(record.metrics_url.replace("/metrics", "/health"))


async def ready(url: str) -> None:
    """Health is checked every second: what a worker needed may have come since."""
    async with asyncio.timeout(30):
        while True:
            try:
                health = json.loads(await asyncio.to_thread(read, url))
            except urllib.error.HTTPError as error:
                if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                    raise
                await asyncio.sleep(0.2)
            else:
                assert health == {"live": True, "ready": True, "reasons": []}
                return


@pytest.mark.long
async def test_an_answer_is_counted_where_it_was_made(records: dict[str, WorkerRecord]) -> None:
    edge, cloud = samples(records["edge-1"]), samples(records["cloud-1"])
    assert edge["e2sci:generation_tokens_total", ()] == 40
    assert edge["e2sci:request_success_total", ("length",)] == 1
    assert edge["e2sci:time_to_first_token_seconds_count", ()] == 1
    assert edge["e2sci:inter_token_latency_seconds_count", ()] < 40
    accepted = edge["e2sci:spec_decode_num_accepted_tokens_total", ()]
    positions = [
        value for (name, _), value in edge.items() if name.endswith("accepted_tokens_per_pos_total")
    ]
    assert sum(positions) == accepted > 0
    assert cloud["e2sci:verify_time_seconds_count", ()] > 0
    assert cloud["e2sci:energy_joules_total", ("modelled",)] > 0
    assert cloud["e2sci:prefix_cache_queries_total", ()] > 0
    assert cloud["e2sci:bytes_received_total", ()] > 100
    controller = samples(records["controller"])
    assert controller["e2sci:controller_leader", ()] == 1
    assert controller["e2sci:window_reports_total", ()] > 0
    assert controller["e2sci:num_requests_waiting", ()] == 0


@pytest.mark.long
@pytest.mark.parametrize("name", ["controller", "cloud-1", "middle-1", "edge-1", "gateway"])
async def test_promtool_finds_nothing(urls: dict[str, str], name: str) -> None:
    """In the names without a colon; with it, as vLLM has them, only that."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool; scripts/install-debian-packages.sh installs it")
    plain, _ = await checked(promtool, f"{urls[name]}?prefix=e2sci_")
    assert plain == 0
    _, lines = await checked(promtool, urls[name])
    assert {line.partition(" ")[2] for line in lines} == {"metric names should not contain ':'"}


async def checked(promtool: str, url: str) -> tuple[int, list[str]]:
    """Exit status and lines of `promtool check metrics`."""
    done = await asyncio.to_thread(
        subprocess.run, [promtool, "check", "metrics"], input=read(url), text=True,
        capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, (done.stdout + done.stderr).splitlines()
