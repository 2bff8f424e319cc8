"""`python -m launch.link --listen 127.0.0.1:0 --to 127.0.0.1:5555 --link 40ms`: the process.

Prints `ready` and the addresses it listens on, one line, and when it ends (SIGTERM, SIGINT) one
line of JSON: what it did and how late it was (`launch.link.accuracy.LinkReport`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence

import msgspec

from bus.protocol.errors import ConfigurationError
from launch.link import READY
from launch.link.profiles import PROFILES, find_link
from launch.link.relay import Address, Relay
from launch.link.streams import new_event_loop


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if len(options.listen) != len(options.to):
        sys.exit("error: as many --listen as --to are needed, in the same order")
    try:
        relay = Relay(find_link(options.link), options.seed)
        pairs = [
            (_address(listen), _address(to))
            for listen, to in zip(options.listen, options.to, strict=True)
        ]
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve(relay, pairs))
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.link",
        description="Emulate a network link on this machine, to measure: pass TCP connections on, "
        "later. Docs: docs/link.md.",
    )
    parser.add_argument(
        "--listen", action="append", required=True, metavar="HOST:PORT",
        help="where to accept connections; port 0 takes a free one; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--to", action="append", required=True, metavar="HOST:PORT",
        help="where they lead, one for each --listen",
    )  # fmt: skip
    parser.add_argument(
        "--link", required=True, metavar="LINK",
        help=f"{', '.join(PROFILES)}, a round trip such as 40ms, or a trace file",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="fixes jitter and loss")
    return parser


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise ConfigurationError(f"{text!r} is no address; expected HOST:PORT")
    return host, int(port)


async def _serve(relay: Relay, pairs: list[tuple[Address, Address]]) -> None:
    told_to_leave = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told_to_leave.set)
    try:
        bound = [relay.listen(listen, to) for listen, to in pairs]
        realtime = _ask_for_realtime()
        print(READY, *(f"{host}:{port}" for host, port in bound), flush=True)
        await told_to_leave.wait()
    finally:
        relay.close()
    print(msgspec.json.encode(relay.report(realtime)).decode(), flush=True)


def _ask_for_realtime() -> bool:
    """Have this process run before all others as soon as it has something to do, which never
    takes long. Its children, if it ever had any, would not inherit that."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except (AttributeError, PermissionError):  # not Linux; not root
        return False
    return True


if __name__ == "__main__":
    main()
