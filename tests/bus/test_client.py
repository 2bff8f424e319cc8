"""The client against a real Valkey, with an edge played by the test."""

from __future__ import annotations

import asyncio

import pytest

from bus.client import Answer, Chunk, Client
from bus.protocol.errors import (
    LocalError,
    RequestError,
    RequestFailedError,
    RequestTimeoutError,
    StoreUnavailableError,
)
from bus.settings import BusSettings
from bus.store import Claim, End, FinishReason, Store, Usage


async def answer_one(store: Store, end: End) -> Claim:
    claim = None
    while claim is None:
        claim = await store.queue.take("edge-1", 1000)
    assert claim.request is not None
    await store.results.append(claim, 0, [1, 2], [True, False], "Hello ")
    await store.results.append(claim, 2, [3], [True], claim.request.prompt)
    await store.queue.finish(claim, end)
    return claim


async def test_submit_stream_result(store: Store, bus_settings: BusSettings) -> None:
    end = End(FinishReason.STOP, usage=Usage(completion_tokens=3))
    async with Client(settings=bus_settings) as client:
        request_id = await client.submit("you", temperature=0.5, top_k=4, stop=["x"], client="me")
        claim = await answer_one(store, end)
        assert claim.request is not None
        assert claim.request.temperature == 0.5
        assert claim.request.client == "me"
        assert [chunk async for chunk in client.stream(request_id)] == [
            Chunk(0, (1, 2), (True, False), "Hello "),
            Chunk(2, (3,), (True,), "you"),
            Chunk(3, end=end),
        ]
        assert await client.result(request_id, timeout_s=60) == Answer(
            request_id, "Hello you", (1, 2, 3), FinishReason.STOP, end.usage
        )


async def test_generate(store: Store, bus_settings: BusSettings) -> None:
    edge = asyncio.create_task(answer_one(store, End(FinishReason.LENGTH)))
    async with Client(settings=bus_settings) as client:
        answer = await client.generate("you", timeout_s=60, max_new_tokens=3)
    await edge
    assert answer.text == "Hello you"
    assert answer.finish_reason == "length"


async def test_an_error_is_an_answer_of_result_and_an_exception_of_generate(
    store: Store, bus_settings: BusSettings
) -> None:
    end = End(FinishReason.ERROR, "the method 'x' is unknown")
    async with Client(settings=bus_settings) as client:
        request_id = await client.submit("you", method="x")
        await answer_one(store, end)
        answer = await client.result(request_id)
        assert (answer.finish_reason, answer.error) == ("error", "the method 'x' is unknown")
        edge = asyncio.create_task(answer_one(store, end))
        with pytest.raises(RequestFailedError, match="the method 'x' is unknown"):
            await client.generate("you", method="x")
        await edge


async def test_a_timeout_cancels_what_generate_has_submitted(
    store: Store, bus_settings: BusSettings
) -> None:
    async with Client(settings=bus_settings) as client:
        with pytest.raises(RequestTimeoutError):
            await client.generate("you", timeout_s=0.05)
    assert (await store.queue.depth()).length == 0


async def test_cancelling_the_caller_cancels_the_request(
    store: Store, bus_settings: BusSettings
) -> None:
    async with Client(settings=bus_settings) as client:
        asking = asyncio.create_task(client.generate("you"))
        claim = await store.queue.take("edge-1", 5000)
        assert claim is not None
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert await store.queue.cancelled([claim.request_id]) == {claim.request_id}


async def test_cancel(store: Store, bus_settings: BusSettings) -> None:
    async with Client(settings=bus_settings) as client:
        request_id = await client.submit("you")
        await client.cancel(request_id)
        assert (await client.result(request_id)).finish_reason == "cancelled"


async def test_wrong_use(bus_settings: BusSettings) -> None:
    with pytest.raises(LocalError, match="async with"):
        await Client(settings=bus_settings).submit("you")
    with pytest.raises(LocalError, match="not both"):
        Client(settings=bus_settings, redis_url="redis://x")
    async with Client(settings=bus_settings) as client:
        with pytest.raises(RequestError, match="temperature"):
            await client.submit("you", temperature=float("inf"))


async def test_no_redis(unused_tcp_port: int) -> None:
    with pytest.raises(StoreUnavailableError, match=f"127.0.0.1:{unused_tcp_port} does not answer"):
        async with Client(redis_url=f"redis://127.0.0.1:{unused_tcp_port}"):
            pass
