"""Cloud workers as an edge finds them, in a real registry, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest

from bus.protocol.codec import AnyMessage
from bus.protocol.errors import RequestError, TokenizerMismatchError
from bus.protocol.messages import CloseSession, Fault, FaultCode, SessionReady
from bus.settings import BusSettings
from bus.store import Role, Store, WorkerRecord
from bus.transport.sockets import Inbox, Publisher, Sockets
from edge_worker import peers as module
from edge_worker.peers import Peer, Peers
from tests.arrivals import take

PATIENCE_S = 20.0
LOOPBACK = "tcp://127.0.0.1:*"
CLOSE = CloseSession("s1", 1, "done")


@pytest.fixture(autouse=True)
def quick_seeking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEEK_INTERVAL_S", 0.01)


async def eventually(condition: Callable[[], Awaitable[Any]]) -> None:
    async def wait() -> None:
        while not await condition():  # noqa: ASYNC110 - polls other processes
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), PATIENCE_S)


class CloudWorker:
    """The sockets and the record of a cloud worker."""

    def __init__(self, store: Store, sockets: Sockets, name: str, **fields: Any) -> None:
        self._store = store
        self.inbox: Inbox = sockets.inbox(LOOPBACK)
        self.publisher: Publisher = sockets.publisher(LOOPBACK)
        plain = WorkerRecord(
            worker_id=name,
            role=Role.CLOUD,
            boot=f"boot-of-{name}",
            endpoints={"windows": self.inbox.endpoint, "feedback": self.publisher.endpoint},
            model="tiny",
            tokenizer_digest="digest",
        )
        self.record = msgspec.structs.replace(plain, **fields)

    async def registers(self, **changes: Any) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)
        await self._store.registry.beat(self.record)

    async def receives(self) -> AnyMessage:
        ((message, _),) = await asyncio.wait_for(take(self.inbox, 1), PATIENCE_S)
        return message


@pytest.fixture
async def sockets(bus_settings: BusSettings) -> AsyncIterator[Sockets]:
    sockets = Sockets(bus_settings)
    yield sockets
    sockets.close()


@pytest.fixture
def heard() -> list[tuple[AnyMessage, int]]:
    return []


@pytest.fixture
async def peers(
    store: Store, sockets: Sockets, heard: list[tuple[AnyMessage, int]]
) -> AsyncIterator[Peers]:
    peers = Peers(
        store, sockets, "edge-1", "digest", 290, lambda _peer, m, size: heard.append((m, size)),
        lambda _peer, _message, _error: None,
    )  # fmt: skip
    yield peers
    peers.close()


async def found(peers: Peers, mismatch_wait_s: float = PATIENCE_S) -> module.Peer:
    return await asyncio.wait_for(peers.find(mismatch_wait_s), PATIENCE_S)


async def test_messages_go_to_the_worker_and_come_back_with_their_size(
    store: Store, sockets: Sockets, peers: Peers, heard: list[tuple[AnyMessage, int]]
) -> None:
    cloud = CloudWorker(store, sockets, "cloud-1")
    await cloud.registers()
    peer = await found(peers)
    size = peer.send(CLOSE)
    assert await cloud.receives() == CLOSE

    async def answered() -> bool:
        cloud.publisher.publish("edge-2", CLOSE)
        cloud.publisher.publish("edge-1", SessionReady("s1", 1, "cloud-1", 7))
        return bool(heard)

    await eventually(answered)
    assert {message for message, _ in heard} == {SessionReady("s1", 1, "cloud-1", 7)}
    assert size > 0
    assert heard[0][1] > 0


async def test_a_message_comes_with_the_worker_that_sent_it(store: Store, sockets: Sockets) -> None:
    """Two workers may give the same handle to different sessions."""
    arrived: list[tuple[str, AnyMessage]] = []
    troubled: list[tuple[str, AnyMessage, str]] = []

    def receive(peer: Peer, message: AnyMessage, _size: int) -> None:
        arrived.append((peer.record.worker_id, message))
        if peer.record.worker_id == "cloud-2":
            raise LookupError("a bug")

    def failed(peer: Peer, message: AnyMessage, error: Exception) -> None:
        troubled.append((peer.record.worker_id, message, str(error)))

    peers = Peers(store, sockets, "edge-1", "digest", 290, receive, failed)
    clouds = [CloudWorker(store, sockets, name) for name in ("cloud-1", "cloud-2")]
    for load, cloud in enumerate(clouds):
        await cloud.registers(load=load)
    await found(peers)
    await peers.find(PATIENCE_S, left="boot-of-cloud-1")
    message = Fault("-", FaultCode.UNKNOWN_SESSION, "gone", 7)

    async def both() -> bool:
        for cloud in clouds:
            cloud.publisher.publish("edge-1", message)
        return {name for name, _ in arrived} == {"cloud-1", "cloud-2"}

    await eventually(both)
    assert {m for _, m in arrived} == {message}
    assert set(troubled) == {("cloud-2", message, "a bug")}
    peers.close()


async def test_the_least_loaded_fitting_worker_is_taken(
    store: Store, sockets: Sockets, peers: Peers
) -> None:
    workers: dict[str, dict[str, Any]] = {
        "cloud-1": {"load": 5},
        "cloud-2": {"load": 2},
        "cloud-3": {"load": 2},
        "cloud-4": {"load": 0, "tokenizer_digest": "another"},
    }
    for name, fields in workers.items():
        await CloudWorker(store, sockets, name, **fields).registers()
    await store.registry.beat(WorkerRecord(worker_id="e", role=Role.EDGE, boot="b"))
    assert (await found(peers)).record.worker_id == "cloud-2"


@pytest.mark.parametrize(
    ("probe", "left", "expected", "changes"),
    [
        ("", "", "cloud-1", 0),  # an answer that has not begun
        ("probe-b", "", "cloud-3", 0),  # of this digest, the least loaded with room
        ("probe-b", "boot-of-cloud-3", "cloud-2", 0),
        ("probe-c", "", "cloud-4", 0),
        ("probe-d", "", "cloud-1", 1),  # the one worker of this digest is full
        ("probe-e", "", "cloud-1", 1),
    ],
)
async def test_an_answer_goes_on_at_a_worker_of_the_digest_it_began_with(
    store: Store, sockets: Sockets, peers: Peers, caplog: pytest.LogCaptureFixture,
    probe: str, left: str, expected: str, changes: int,
) -> None:  # fmt: skip
    workers: dict[str, dict[str, Any]] = {
        "cloud-1": {"load": 0, "probe_digest": "probe-a"},
        "cloud-2": {"load": 3, "probe_digest": "probe-b"},
        "cloud-3": {"load": 2, "probe_digest": "probe-b"},
        "cloud-4": {"load": 6, "probe_digest": "probe-c"},
        "cloud-5": {"load": 4, "capacity": 4, "probe_digest": "probe-d"},
    }
    for name, fields in workers.items():
        await CloudWorker(store, sockets, name, **fields).registers()
    peer = await asyncio.wait_for(peers.find(PATIENCE_S, probe, left), PATIENCE_S)
    assert peer.record.worker_id == expected
    assert sockets.counters["digest_changes"] == changes
    assert caplog.text.count("may differ from here on") == changes


async def test_the_only_worker_is_taken_again_though_the_session_left_it(
    store: Store, sockets: Sockets, peers: Peers
) -> None:
    await CloudWorker(store, sockets, "cloud-1", load=4, capacity=4).registers()
    peer = await asyncio.wait_for(peers.find(PATIENCE_S, "", "boot-of-cloud-1"), PATIENCE_S)
    assert peer.record.worker_id == "cloud-1"


async def test_a_worker_is_connected_to_once_and_shared(
    store: Store, sockets: Sockets, peers: Peers
) -> None:
    cloud = CloudWorker(store, sockets, "cloud-1")
    await cloud.registers()
    peer = await found(peers)
    await cloud.registers(load=1)
    assert await found(peers) is peer
    await cloud.registers(boot="another")
    again = await found(peers)
    assert again is not peer
    assert again.record.boot == "another"


async def test_with_nobody_there_it_waits(store: Store, sockets: Sockets, peers: Peers) -> None:
    finding = asyncio.create_task(peers.find(mismatch_wait_s=0.0))
    await asyncio.sleep(0.05)
    assert not finding.done()
    await CloudWorker(store, sockets, "cloud-1").registers()
    assert (await asyncio.wait_for(finding, PATIENCE_S)).record.worker_id == "cloud-1"


async def test_workers_of_another_tokenizer_only_are_an_error_that_names_them(
    store: Store, sockets: Sockets, peers: Peers
) -> None:
    await CloudWorker(store, sockets, "cloud-1", tokenizer_digest="another").registers()
    with pytest.raises(TokenizerMismatchError, match=r"live ones: cloud-1 \(tiny\)"):
        await found(peers, mismatch_wait_s=0.02)


async def test_a_target_that_writes_tokens_the_draft_lacks_is_an_error_that_counts_them(
    store: Store, sockets: Sockets, peers: Peers
) -> None:
    await CloudWorker(store, sockets, "cloud-1", vocab_size=291).registers()
    with pytest.raises(TokenizerMismatchError, match=r"knows 290 tokens, .* writes 291; .*cloud-1"):
        await found(peers, mismatch_wait_s=0.02)
    await CloudWorker(store, sockets, "cloud-2", vocab_size=280).registers()
    assert (await found(peers)).record.worker_id == "cloud-2"


async def test_a_fitting_worker_that_comes_in_time_is_no_error(
    store: Store, sockets: Sockets, peers: Peers
) -> None:
    await CloudWorker(store, sockets, "cloud-1", tokenizer_digest="another").registers()
    finding = asyncio.create_task(peers.find(mismatch_wait_s=PATIENCE_S))
    await asyncio.sleep(0.05)
    await CloudWorker(store, sockets, "cloud-2").registers()
    assert (await asyncio.wait_for(finding, PATIENCE_S)).record.worker_id == "cloud-2"


async def test_who_has_left_or_restarted_is_gone(
    store: Store, sockets: Sockets, peers: Peers
) -> None:
    cloud = CloudWorker(store, sockets, "cloud-1")
    await cloud.registers()
    peer = await found(peers)
    assert not await peers.is_gone(peer)
    await cloud.registers(boot="another")
    assert await peers.is_gone(peer)
    await store.registry.remove("cloud-1", "another")
    assert await peers.is_gone(peer)


async def test_a_worker_whose_heartbeat_lapses_stays_connected_while_a_session_holds_it(
    store: Store, sockets: Sockets, peers: Peers
) -> None:
    """Another session's search must not close it under the holder's feet."""
    cloud = CloudWorker(store, sockets, "cloud-1")
    await cloud.registers()
    held = await found(peers)
    await store.registry.remove("cloud-1", cloud.record.boot)
    await CloudWorker(store, sockets, "cloud-2").registers()
    assert (await found(peers)).record.worker_id == "cloud-2"
    held.send(CLOSE)
    assert await cloud.receives() == CLOSE
    await cloud.registers(load=-1)
    assert await found(peers) is held


async def test_a_worker_that_left_is_disconnected_once_nobody_holds_it(
    store: Store, sockets: Sockets, peers: Peers
) -> None:
    cloud = CloudWorker(store, sockets, "cloud-1")
    await cloud.registers()
    peer = await found(peers)
    peers.let_go(peer)
    await store.registry.remove("cloud-1", cloud.record.boot)
    await CloudWorker(store, sockets, "cloud-2").registers()
    await found(peers)
    peer.send(CLOSE)
    assert sockets.counters["dropped_sends"] == 1


async def test_a_listener_that_fails_is_noticed_and_its_worker_connected_anew(
    store: Store, sockets: Sockets, heard: list[tuple[AnyMessage, int]]
) -> None:
    """Nothing would ever come from it: whoever holds it finds it gone."""

    def failed(_peer: Peer, _message: AnyMessage, error: Exception) -> None:
        raise error

    def receive(_peer: Peer, message: AnyMessage, size: int) -> None:
        heard.append((message, size))
        raise LookupError("a bug")

    peers = Peers(store, sockets, "edge-1", "digest", 290, receive, failed)
    cloud = CloudWorker(store, sockets, "cloud-1")
    await cloud.registers()
    peer = await found(peers)

    async def silenced() -> bool:
        cloud.publisher.publish("edge-1", CLOSE)
        return peer.silenced

    await eventually(silenced)
    assert await peers.is_gone(peer)
    assert sockets.counters["failed_listeners"] == 1
    assert await found(peers) is not peer
    peers.close()


async def test_a_full_worker_is_asked_again_after_the_pause_or_when_it_is_our_turn(
    store: Store, sockets: Sockets, peers: Peers
) -> None:
    await CloudWorker(store, sockets, "cloud-1", load=4, capacity=4).registers()
    order: list[int] = []

    async def wait(turn: int) -> None:
        await peers.find(PATIENCE_S, pause_s=1000.0, turn=turn)
        order.append(turn)

    waiting = [asyncio.create_task(wait(turn)) for turn in (7, 3, 5)]
    await asyncio.sleep(0.1)
    assert order == []
    while len(order) < 3:
        before = len(order)
        peers.vacated()
        while len(order) == before:  # noqa: ASYNC110 - polls another task
            await asyncio.sleep(0.005)
    assert order == [3, 5, 7]
    await asyncio.gather(*waiting)
    await asyncio.wait_for(peers.find(PATIENCE_S, pause_s=0.01), PATIENCE_S)


async def test_a_worker_with_room_is_asked_at_once(
    store: Store, sockets: Sockets, peers: Peers
) -> None:
    await CloudWorker(store, sockets, "cloud-1").registers()
    await CloudWorker(store, sockets, "cloud-2", load=9, capacity=10).registers()
    finding = peers.find(PATIENCE_S, left="boot-of-cloud-1", pause_s=1000.0)
    assert (await asyncio.wait_for(finding, PATIENCE_S)).record.worker_id == "cloud-2"


@pytest.mark.parametrize(
    "endpoints",
    [{}, {"windows": "nonsense", "feedback": "nonsense"}, {"windows": "tcp://127.0.0.1:9999"}],
)
async def test_a_worker_with_an_address_that_is_none_is_passed_over(
    store: Store, sockets: Sockets, peers: Peers, endpoints: dict[str, str]
) -> None:
    await CloudWorker(store, sockets, "cloud-1", endpoints=endpoints).registers()
    finding = asyncio.create_task(peers.find(mismatch_wait_s=0.0))
    await asyncio.sleep(0.05)
    assert not finding.done()
    await CloudWorker(store, sockets, "cloud-2", load=9).registers()
    assert (await asyncio.wait_for(finding, PATIENCE_S)).record.worker_id == "cloud-2"


async def test_a_method_with_a_speculator_goes_to_a_worker_that_has_it(
    store: Store, sockets: Sockets, peers: Peers
) -> None:
    await CloudWorker(store, sockets, "cloud-1").registers()
    with pytest.raises(RequestError, match="no cloud worker has the speculator") as refused:
        await asyncio.wait_for(peers.find(0.02, speculator="medusa"), PATIENCE_S)
    assert "--speculator DIR" in str(refused.value)
    assert "cloud-1 (tiny)" in str(refused.value)
    busy = CloudWorker(store, sockets, "cloud-2", speculators=("eagle3", "medusa"))
    await busy.registers(load=3)
    peer = await asyncio.wait_for(peers.find(PATIENCE_S, speculator="medusa"), PATIENCE_S)
    assert peer.record.worker_id == "cloud-2"
    assert (await found(peers)).record.worker_id == "cloud-1", "else the least loaded"
