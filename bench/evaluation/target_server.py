"""The target alone, serving one reader at a time: `python -m bench.evaluation.target_server`.

A request is a list [prompt token ids, most new tokens]; the answer is one message for each token,
and an empty one at the end. The reader sits behind an emulated link, so its tokens come as late as
they would from a cloud that streams them.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import msgpack
import torch
import zmq
import zmq.asyncio

from bench.link.process import LinkProcess
from bench.paced import paced
from cloud_worker.reference import generate_alone
from cloud_worker.target_model import TargetModel
from decoding.sampling import SamplingParams
from launch.python import module_command, module_env
from launch.supervisor import ProcessSpec, ProcessTree

_NAME, _READY = "target", "ready"
_HOST = "tcp://127.0.0.1"


class TargetAlone:
    """`async with TargetAlone("default", "float32", "40ms") as alone:` and `alone.stream(…)`.

    Args:
        target, dtype: as a cloud worker takes them.
        link: between the server and this process.
        least_pass_ms: a token takes at least so long.
    """

    def __init__(self, target: str, dtype: str, link: str, least_pass_ms: float = 0.0) -> None:
        command = (
            *module_command("bench.evaluation.target_server"), "--target", target, "--dtype", dtype,
            "--least-pass-ms", str(least_pass_ms),
        )  # fmt: skip
        spec = ProcessSpec(_NAME, command, module_env(), quiet=True)
        self._tree = ProcessTree([spec], log=lambda _: None, probe=self._listening)
        self._link_name = link
        self._link: LinkProcess | None = None
        self._context = zmq.asyncio.Context()
        self._socket: Any = None
        self._turn = asyncio.Lock()

    @property
    def pid(self) -> int:
        return self._tree.process(_NAME).pid

    async def __aenter__(self) -> Self:
        """Raises ConfigurationError where the server or the link cannot be started."""
        try:
            self._tree.start()
            await self._tree.ready()
            port = next(line for line in self._lines() if line.startswith(_READY)).split()[1]
            self._link = LinkProcess([f"127.0.0.1:{port}"], self._link_name)
            await self._link.start()
        except BaseException:
            await self.__aexit__()
            raise
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.connect(f"tcp://{self._link.listening[0]}")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._context.destroy(linger=0)
        if self._link is not None and self._link.listening:
            await self._link.stop()
        await self._tree.stop()

    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncIterator[int]:
        """The target's own greedy answer, token by token; several readers take turns."""
        async with self._turn:
            await self._socket.send(msgpack.packb([list(prompt), max_new_tokens]))
            while word := await self._socket.recv():
                yield int(msgpack.unpackb(word))

    def _lines(self) -> list[str]:
        return list(self._tree.process(_NAME).last_lines)

    async def _listening(self) -> set[str]:
        return {_NAME} if any(line.startswith(_READY) for line in self._lines()) else set()


def main() -> None:
    parser = argparse.ArgumentParser(description="The target alone, streaming its tokens.")
    parser.add_argument("--target", default="default", help="as for `e2sci up`")
    parser.add_argument("--dtype", default="auto", help="as for `e2sci up`")
    parser.add_argument("--least-pass-ms", type=float, default=0.0, help="pads each token")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = TargetModel.load(options.target, options.dtype)
    socket = zmq.Context().socket(zmq.PAIR)
    print(_READY, socket.bind_to_random_port(_HOST), flush=True)
    while True:
        prompt, most = msgpack.unpackb(socket.recv())
        stream = generate_alone(target, prompt, SamplingParams(), most, target.eos_tokens)
        for token in paced(stream, options.least_pass_ms):
            socket.send(msgpack.packb(token))
        socket.send(b"")


if __name__ == "__main__":
    main()
