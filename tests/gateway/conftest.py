"""A gateway under a real HTTP server, over a real queue with a scripted edge."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2
import pytest
import pytest_asyncio
import uvicorn
from openai import AsyncOpenAI

from bus.settings import BusSettings
from bus.store import Store
from gateway.app import build_app
from gateway.settings import GatewaySettings
from launch.stack import Stack, StackOptions
from tests.engines.tiny import save_tiny
from tests.gateway.scripted import ScriptedEdge
from tests.processes.conftest import converted

MakeGateway = Callable[..., Awaitable[str]]


@pytest.fixture
async def edge(store: Store) -> AsyncIterator[ScriptedEdge]:
    """An edge that answers, registered beside a cloud worker."""
    edge = ScriptedEdge(store)
    await edge.register()
    running = asyncio.create_task(edge.run())
    yield edge
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


@pytest.fixture
async def make_gateway(bus_settings: BusSettings) -> AsyncIterator[MakeGateway]:
    """Starts gateways with the given settings; each call returns a URL."""
    async with contextlib.AsyncExitStack() as exits:

        async def make(**options: Any) -> str:
            settings = GatewaySettings.load(
                **{
                    "redis_url": bus_settings.redis_url,
                    "key_prefix": bus_settings.key_prefix,
                    **options,
                }
            )
            return await exits.enter_async_context(_served(settings))

        yield make


@contextlib.asynccontextmanager
async def _served(settings: GatewaySettings) -> AsyncIterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        build_app(settings), log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await running


@pytest.fixture
async def url(make_gateway: MakeGateway) -> str:
    """Of a gateway with default settings."""
    return await make_gateway()


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """A plain HTTP client of it."""
    async with httpx2.AsyncClient(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture
async def openai(url: str) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's own client of it."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def until(condition: Callable[[], bool]) -> None:
    """Return once it holds; the test's own time limit fails it otherwise."""
    while not condition():  # noqa: ASYNC110 - what it looks at has no event
        await asyncio.sleep(0.01)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A real one on tiny models, with its gateway."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        target, draft = (converted(save_tiny(folder / name)) for name in ("target", "draft"))
    options = StackOptions(
        target=str(target), draft=str(draft), dtype="int8", threads=1, gateway_port=18_100
    )
    env = {"OMP_NUM_THREADS": "1", "E2SCI_LEAST_PASS_MS": "6"}
    async with Stack(options, log=lambda _: None, env=env) as running:
        yield running
