"""Baselines that are one process, with one reader at a time.

`python -m bench.evaluation.baseline_server` serves the target alone and co-located speculative
decoding. A request is a list [prompt token ids, most new tokens, window]; a window of 0 is the
target alone. The answer is a `Piece` for each target pass, and an empty message at the end. In the
cloud, the reader is behind an emulated link and its tokens arrive as late as from a cloud that
streams them. On the edge there is no link.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import torch

from bench.child import ChildProcess, listen
from bench.evaluation.colocated import Piece, generate_colocated
from bench.paced import THIS_DEVICE, Device, paced
from bench.reference import generate_alone
from decoding.engine import Drafter
from decoding.sampling import SamplingParams
from engines.kinds import DrafterKind, drafter_of
from engines.padding import LeastTimes, Padding
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel
from launch.link.process import LinkProcess

_MODULE = "bench.evaluation.baseline_server"
PASS_COUNTS, STEP_COUNTS = "baseline-passes", "baseline-steps"
Request = tuple[list[int], int, int]


@dataclass(frozen=True, slots=True)
class ServedModels:
    """What a server loads.

    Attributes:
        target, draft, dtype: as for `e2sci up`. draft: None serves the target alone only.
        drafter: who drafts (`engines.kinds.DrafterKind`).
        device: whose times its steps and passes take.
        counts: directory of the counts of padded steps and passes, or None.
    """

    target: str
    draft: str | None
    dtype: str
    drafter: str = DrafterKind.MODEL
    device: Device = THIS_DEVICE
    counts: Path | None = None

    def arguments(self) -> list[str]:
        """For the command line."""
        return [
            "--target", self.target, "--dtype", self.dtype, "--drafter", self.drafter,
            "--least-step-ms", f"{self.device.least_step_ms:g}",
            "--least-pass-ms", str(self.device.least_passes),
            *(("--draft", self.draft) if self.draft is not None else ()),
            *(("--counts", str(self.counts)) if self.counts is not None else ()),
        ]  # fmt: skip


class BaselineServer:
    """`async with BaselineServer(models, "40ms") as server:` and `server.stream(…)`.

    One process serves all baselines, since weights are large: it is on the core of whichever side
    is asked for.

    Args:
        link: between the cloud's side and this process.
    """

    def __init__(self, models: ServedModels, link: str) -> None:
        self._child = ChildProcess("baselines", _MODULE, models.arguments())
        self._link_name = link
        self._exits = AsyncExitStack()
        self._far: Any = None
        self._near: Any = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Raises ConfigurationError where the server or the link cannot be started."""
        try:
            await self._exits.enter_async_context(self._child)
            link = LinkProcess([self._child.address], self._link_name)
            await self._exits.enter_async_context(link)
            self._far = self._child.connect(link.listening[0])
            self._near = self._child.connect(self._child.address)
        except BaseException:
            await self._exits.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    async def stream(
        self, prompt: Sequence[int], max_new_tokens: int, window: int = 0, on_edge: bool = False
    ) -> AsyncIterator[Piece]:
        """The target's own greedy answer, pass by pass; several readers take turns.

        Args:
            window: tokens drafted before each pass; 0 is the target alone.
            on_edge: on the edge's core and without a link.
        """
        async with self._turn:
            self._child.pin(last=not on_edge)
            socket = self._near if on_edge else self._far
            request: Request = (list(prompt), max_new_tokens, window)
            await socket.send(msgspec.msgpack.encode(request))
            while word := await socket.recv():
                yield msgspec.msgpack.decode(word, type=Piece)


class _Models:
    """What the child process runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._target = TargetModel.load(options.target, options.dtype)
        self._draft: Drafter[Any] | None = None
        counts: Path | None = options.counts
        passes = None if counts is None else counts / PASS_COUNTS
        self._padding = Padding(LeastTimes.parse(options.least_pass_ms), passes)
        self._target.padding = self._padding
        if options.draft is not None:
            model = ModelDrafter.load(options.draft, options.dtype)
            steps = None if counts is None else counts / STEP_COUNTS
            model.padding = Padding(LeastTimes.parse(options.least_step_ms), steps)
            self._draft = drafter_of(DrafterKind(options.drafter), model)

    def answer(self, prompt: list[int], most: int, window: int) -> Iterator[Piece]:
        target, eos = self._target, self._target.eos_tokens
        if window:
            assert self._draft is not None
            yield from generate_colocated(target, self._draft, prompt, window, most, eos)
            return
        stream = generate_alone(target, prompt, SamplingParams(), most, eos)
        for token in paced(stream, self._padding):
            yield Piece((token,))


def main() -> None:
    parser = argparse.ArgumentParser(description="Baselines: the target alone, co-located SD.")
    parser.add_argument("--target", default="default", help="as for `e2sci up`")
    parser.add_argument("--draft", help="for co-located SD, as for `e2sci up`")
    parser.add_argument(
        "--drafter", default=DrafterKind.MODEL, choices=list(DrafterKind), help="who drafts"
    )
    parser.add_argument("--dtype", default="auto", help="as for `e2sci up`")
    parser.add_argument("--least-step-ms", default="0", help="pads draft steps")
    parser.add_argument("--least-pass-ms", default="0", help="pads passes, as for a cloud worker")
    parser.add_argument("--counts", type=Path, help="directory of the counts of padded passes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = _Models(options)
    socket = listen()
    while True:
        reader, word = socket.recv_multipart()
        for piece in models.answer(*msgspec.msgpack.decode(word, type=Request)):
            socket.send_multipart([reader, msgspec.msgpack.encode(piece)])
        socket.send_multipart([reader, b""])


if __name__ == "__main__":
    main()
