"""The link as a process: started, told wrongly, stopped; alone and before a cloud worker."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from bus.protocol.errors import ConfigurationError, LocalError
from launch.link.__main__ import main
from launch.link.accuracy import Lateness
from launch.link.process import LinkProcess, read_report
from launch.links import Links
from tests.launch.kept import KeptLog


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
    writer.close()


async def ask(host: str, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"hello")
    try:
        return await reader.readexactly(5)
    finally:
        writer.close()


async def test_a_program_starts_a_link_and_learns_what_it_did() -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, LinkProcess([address, address], "1ms") as link:
        assert len(set(link.listening)) == 2
        for front in link.listening:
            host, _, port = front.rpartition(":")
            assert await ask(host, int(port)) == b"hello"
    assert link.report is not None
    assert (link.report.connections, link.report.bytes_up, link.report.bytes_down) == (2, 10, 10)
    assert link.report.late_max_ms is not None
    assert link.report.late_max_ms >= 0


async def test_a_wrong_link_ends_the_start_with_its_reason() -> None:
    with pytest.raises(ConfigurationError, match="there is no link '6g'"):
        await LinkProcess(["127.0.0.1:1"], "6g").start()


async def test_links_stand_before_cloud_workers_and_only_they_know() -> None:
    log = KeptLog()
    links = Links(["cloud-1", "cloud-2"], "1ms", 7, log=log)
    try:
        await links.start()
        assert [process.name for process in links.processes] == ["link-1", "link-2"]
        assert links.cloud_env("edge-1") == {}
        env = links.cloud_env("cloud-2")
        assert (env["E2SCI_BIND_HOST"], env["E2SCI_ADVERTISE_HOST"]) == ("127.0.0.1", "127.0.0.1")
        for name in ("WINDOWS", "FEEDBACK"):
            behind = int(env[f"E2SCI_{name}_PORT"])
            front = int(env[f"E2SCI_ADVERTISE_{name}_PORT"])
            async with await asyncio.start_server(echo, "127.0.0.1", behind):
                assert await ask("127.0.0.1", front) == b"hello"
    finally:
        await links.stop()
    reports = [read_report(list(process.last_lines)) for process in links.processes]
    assert [report.connections for report in reports] == [0, 2]
    assert log.lines == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--listen", "127.0.0.1:0", "--to", "nowhere"], "'nowhere' is no address"),
        (["--listen", "127.0.0.1:0", "--to", "127.0.0.1:70000"], "no address"),
        (["--listen", "203.0.113.1:0", "--to", "127.0.0.1:1"], "cannot listen on 203.0.113.1:0"),
    ],
)
def test_a_wrong_address_is_a_wrong_configuration(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--link", "1ms"])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_the_measurement_prints_what_the_link_added(request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "cli.main", "bench", "link", "4ms", "--messages", "5"]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=True,
        cwd=request.config.rootpath,
    )  # fmt: skip
    figures = json.loads(done.stdout)
    assert figures["through"]["min"] >= 4
    assert figures["report"]["bytes_up"] == 6 * 1200


def test_lateness_in_figures() -> None:
    lateness = Lateness()
    assert lateness.summary_ms() == (None, None, None)
    for late_us in range(1, 102):
        lateness.add(late_us * 1000)
    assert lateness.count == 101
    assert lateness.summary_ms() == (0.051, 0.1, 0.101)


def test_a_link_without_a_report_did_not_end_in_order() -> None:
    with pytest.raises(LocalError, match="without a report"):
        read_report(["ready 127.0.0.1:1"])
    with pytest.raises(LocalError, match="without a report"):
        read_report([])
