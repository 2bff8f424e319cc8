"""`e2sci bench link`: how well the link holds its delays on this machine.

Messages go to an echo server straight and through the link, in turn. Reported are the link's own
account (actual minus scheduled release) and what the link added to an echo, which also shows what
the link cannot see: the time until a peer is told of bytes. Both ends are threads of this process.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from launch.link.accuracy import LinkReport
from launch.link.process import LinkProcess
from launch.link.profiles import find_link

__all__ = ["run"]

PAUSE_S = 0.005
"""Between messages, so that each finds both ends asleep, as a window does."""


def run(link: str, messages: int, size: int, as_json: bool) -> None:
    """Measure and print: a table for people, one JSON object on one line for programs.

    Raises:
        ConfigurationError: there is no such link.
    """
    find_link(link)
    direct_ms, through_ms, report = asyncio.run(_measure(link, messages, size))
    added_ms = through_ms - np.median(direct_ms)
    figures = {
        "direct": _figures(direct_ms), "through": _figures(through_ms), "added": _figures(added_ms)
    }  # fmt: skip
    if as_json:
        print(json.dumps({"link": link, **figures, "report": msgspec.to_builtins(report)}))
    else:
        _print(link, figures, report)


async def _measure(
    link: str, messages: int, size: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], LinkReport]:
    """Echo times in milliseconds straight and through the link, and the link's report."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        port = server.getsockname()[1]
        process = LinkProcess([f"127.0.0.1:{port}"], link)
        async with process:
            host, _, front = process.listening[0].rpartition(":")
            addresses = [("127.0.0.1", port), (host, int(front))]
            times_ms = await asyncio.to_thread(_echo_times_ms, addresses, messages, size)
    assert process.report is not None
    return times_ms[0], times_ms[1], process.report


def _serve(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # the measurement is over
            return
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        while data := connection.recv(2**16):
            connection.sendall(data)


def _echo_times_ms(
    addresses: list[tuple[str, int]], messages: int, size: int
) -> np.ndarray[Any, Any]:
    """Shape [addresses, messages]; the addresses take turns."""
    connections = [socket.create_connection(address) for address in addresses]
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _echo_time_ms(connection, size)  # connecting is not counted
    times_ms = np.empty((len(addresses), messages))
    for number in range(messages):
        for row, connection in enumerate(connections):
            time.sleep(PAUSE_S)
            times_ms[row, number] = _echo_time_ms(connection, size)
    for connection in connections:
        connection.close()
    return times_ms


def _echo_time_ms(connection: socket.socket, size: int) -> float:
    began_ns = time.monotonic_ns()
    connection.sendall(bytes(size))
    missing = size
    while missing:
        missing -= len(connection.recv(missing))
    return (time.monotonic_ns() - began_ns) / 1e6


def _figures(times_ms: np.ndarray[Any, Any]) -> dict[str, float]:
    names = ("min", "median", "p99", "max")
    values = np.percentile(times_ms, [0, 50, 99, 100])
    return {name: round(float(value), 3) for name, value in zip(names, values, strict=True)}


def _print(link: str, figures: dict[str, dict[str, float]], report: LinkReport) -> None:
    table = Table(title=f"Link {link} (measured)")
    for heading in ("ms", "min", "median", "p99", "max"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    labels = {
        "direct": "echo without the link",
        "through": "echo through the link",
        "added": "what the link added to the median",
    }
    for name, label in labels.items():
        table.add_row(label, *(f"{value:.3f}" for value in figures[name].values()))
    own = (report.late_median_ms, report.late_p99_ms, report.late_max_ms)
    cells = ("–" if value is None else f"{value:.3f}" for value in own)
    table.add_row("its own error: released too late by", "", *cells)
    console = Console()
    console.print(table)
    priority = "real-time" if report.realtime else "normal (root gets real-time)"
    console.print(f"{report.releases} releases, {report.resent} resent, priority {priority}")
