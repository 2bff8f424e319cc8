"""`e2sci doctor` and the way to a cloud worker: a toy target on real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from bench.doctor import network
from bench.doctor.checks import Status
from bench.doctor.network import check_links
from bus.settings import BusSettings
from bus.store import Role, Store, WorkerRecord
from bus.transport.sockets import Sockets
from launch.link.process import LinkProcess
from tests.edge_worker.shell import Cloud, House


@pytest.fixture
async def house(store: Store, bus_settings: BusSettings) -> AsyncIterator[House]:
    house = House(store, bus_settings)
    yield house
    for cloud in house.clouds:
        await cloud.stop()


def through(cloud: Cloud, listening: Sequence[str]) -> WorkerRecord:
    """The record with the addresses of a link before it."""
    windows, feedback = (f"tcp://{address}" for address in listening)
    return msgspec.structs.replace(
        cloud.lifecycle.record, endpoints={"windows": windows, "feedback": feedback}
    )


async def test_round_trip_and_bandwidth_to_a_real_cloud_worker(
    house: House, bus_settings: BusSettings
) -> None:
    cloud = house.cloud()
    record = cloud.lifecycle.record
    checks, links = await check_links(bus_settings, [record], bandwidth=True)
    assert [check.status for check in checks] == [Status.OK]
    (link,) = links
    assert (link.worker, link.role, link.lost, link.source) == (
        "cloud-1", Role.CLOUD, 0.0, "measured",
    )  # fmt: skip
    assert 0 < link.rtt_min_ms <= link.rtt_ms <= link.rtt_max_ms
    assert link.up_mbit_s is not None
    assert link.up_mbit_s > 0
    assert "(measured)" in checks[0].sentence


async def test_no_session_is_made_and_no_model_runs(
    house: House, bus_settings: BusSettings
) -> None:
    cloud = house.cloud()
    await check_links(bus_settings, [cloud.lifecycle.record], bandwidth=True)
    assert not cloud.worker._sessions
    assert cloud.sockets.counters["faults"] >= network.SMALL + network.LARGE
    assert cloud.sockets.counters["bad_frames"] == 0


async def test_a_link_s_delay_and_rate_are_found(
    house: House, bus_settings: BusSettings, tmp_path: Path
) -> None:
    """Real bytes through the emulated link, which is never early nor faster than its rate."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"at_s": 0, "one_way_ms": 20, "mbps": 20}\n')
    cloud = house.cloud()
    ends = [cloud.lifecycle.record.endpoints[name] for name in ("windows", "feedback")]
    async with LinkProcess([end.removeprefix("tcp://") for end in ends], str(trace)) as link:
        _, links = await check_links(bus_settings, [through(cloud, link.listening)], bandwidth=True)
    (found,) = links
    assert found.rtt_ms >= 40.0
    assert found.up_mbit_s is not None
    assert found.up_mbit_s <= 40.0


async def test_a_dead_endpoint_fails_with_advice(bus_settings: BusSettings) -> None:
    dead = WorkerRecord(
        worker_id="cloud-9", role=Role.CLOUD, boot="x",
        endpoints={"windows": "tcp://127.0.0.1:1", "feedback": "tcp://127.0.0.1:2"},
    )  # fmt: skip
    checks, links = await check_links(bus_settings, [dead], bandwidth=False, patience_s=0.3)
    assert [check.status for check in checks] == [Status.FAILED]
    assert "cloud-9 has a live heartbeat, but does not answer" in checks[0].sentence
    for word in ("firewall", "E2SCI_ADVERTISE_HOST", "tcp://127.0.0.1:1"):
        assert word in checks[0].sentence + checks[0].advice
    assert links == []


async def test_an_address_that_is_none_fails_and_the_others_are_measured(
    house: House, bus_settings: BusSettings
) -> None:
    good = house.cloud().lifecycle.record
    bad = msgspec.structs.replace(good, worker_id="cloud-0", endpoints={"windows": "nowhere"})
    checks, links = await check_links(bus_settings, [bad, good], bandwidth=False)
    assert [check.status for check in checks] == [Status.FAILED, Status.OK]
    assert "cloud-0" in checks[0].sentence
    assert [link.up_mbit_s for link in links] == [None]


async def test_edges_and_controllers_are_not_asked(bus_settings: BusSettings) -> None:
    edge = WorkerRecord(worker_id="edge-1", role=Role.EDGE, boot="x")
    assert await check_links(bus_settings, [edge], bandwidth=False) == ([], [])


async def test_a_middle_worker_is_asked_too(house: House, bus_settings: BusSettings) -> None:
    record = house.middle().lifecycle.record
    _, links = await check_links(bus_settings, [record], bandwidth=False)
    assert [link.role for link in links] == [Role.MIDDLE]


def keys() -> dict[str, Any]:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    return {"curve_public_key": public, "curve_secret_key": secret}


async def test_keys_must_be_the_same(house: House, bus_settings: BusSettings) -> None:
    ours = keys()
    record = house.cloud(**ours).lifecycle.record
    for used, patience_s, status in ((ours, 10.0, Status.OK), (keys(), 0.5, Status.FAILED)):
        settings = BusSettings.load(**house.where, **used)
        checks, _ = await check_links(settings, [record], False, patience_s)
        assert [check.status for check in checks] == [status]


async def test_lost_answers_are_counted(
    house: House, bus_settings: BusSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third refusal disappears on its way back."""
    record = house.cloud().lifecycle.record
    count = 0
    receive = network._Questioner._answered

    def lossy(asking: network._Questioner, message: object, size: int) -> None:
        nonlocal count
        count += 1
        if count % 3:
            receive(asking, message, size)  # type: ignore[arg-type]

    monkeypatch.setattr(network._Questioner, "_answered", lossy)
    sockets = Sockets(bus_settings)
    try:
        link = await network.measure_link(sockets, record, bandwidth=False, patience_s=0.3)
    finally:
        sockets.close()
    assert link is not None
    assert 0.25 < link.lost < 1.0
    assert network._described(link).status is Status.WARNING
