"""A process of ours that loads models and then answers on a socket.

The child prints `ready PORT` once it listens; requests and answers are MessagePack. Baselines and
the measurement of contended times are such processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import msgspec
import zmq
import zmq.asyncio

from bench.cores import pin_process
from launch.python import module_command, module_env
from launch.supervisor import ProcessSpec, ProcessTree

_READY = "ready"
_HOST = "tcp://127.0.0.1"


class ChildProcess:
    """`async with ChildProcess("target", "bench.…", ["--dtype", "int8"]) as child:`.

    Args:
        name: of the process in error messages. module: run with `python -m`.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str]) -> None:
        self._name = name
        spec = ProcessSpec(name, (*module_command(module), *arguments), module_env(), quiet=True)
        self._tree = ProcessTree([spec], log=lambda _: None, probe=self._listening)
        self._context = zmq.asyncio.Context()
        self._socket: Any = None

    @property
    def address(self) -> str:
        """Where it listens: `host:port`."""
        return f"127.0.0.1:{self._ready_line().split()[1]}"

    def connect(self, address: str) -> Any:
        """A socket of this process that talks to it, directly or through a link."""
        socket = self._context.socket(zmq.DEALER)
        socket.connect(f"tcp://{address}")
        return socket

    def pin(self, last: bool) -> None:
        """Run it on the first core (the edge's) or on the last (the cloud's)."""
        pin_process(self._tree.process(self._name).pid, last)

    async def ask(self, *request: Any) -> Any:
        """One request and its one answer, without a link."""
        if self._socket is None:
            self._socket = self.connect(self.address)
        await self._socket.send(msgspec.msgpack.encode(request))
        return msgspec.msgpack.decode(await self._socket.recv())

    async def start(self) -> None:
        """Start it and wait until it listens.

        Raises:
            ConfigurationError: it cannot be started; the text holds its reason.
        """
        try:
            self._tree.start()
            await self._tree.ready()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End it, and close the sockets that lead to it."""
        self._context.destroy(linger=0)
        await self._tree.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _ready_line(self) -> str:
        lines = self._tree.process(self._name).last_lines
        return next((line for line in lines if line.startswith(_READY)), "")

    async def _listening(self) -> set[str]:
        return {self._name} if self._ready_line() else set()


def listen() -> Any:
    """In the child: a bound ROUTER socket, announced to the parent."""
    socket = zmq.Context().socket(zmq.ROUTER)
    print(_READY, socket.bind_to_random_port(_HOST), flush=True)
    return socket
