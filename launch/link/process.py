"""The link as a child process of a program: benchmarks and tests start and stop it here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import msgspec

from bus.protocol.errors import LocalError
from launch.link import MODULE, READY
from launch.link.accuracy import LinkReport
from launch.python import module_command, module_env
from launch.supervisor import ProcessSpec, ProcessTree

__all__ = ["LinkProcess", "read_report"]

_NAME = "link"


class LinkProcess:
    """`async with LinkProcess(["127.0.0.1:5555"], "40ms") as link:` … `link.listening[0]`.

    Args:
        to: addresses `host:port` that the link leads to.
        link: a profile, a round trip or a trace file, see `profiles.find_link`.
        seed: fixes jitter and loss.

    Attributes:
        listening: the addresses in front, in the order of `to`.
        report: what it did, once it has been stopped.
    """

    def __init__(self, to: Sequence[str], link: str, seed: int = 0) -> None:
        self.listening: tuple[str, ...] = ()
        self.report: LinkReport | None = None
        ends = [flag for address in to for flag in ("--listen", "127.0.0.1:0", "--to", address)]
        command = (
            *module_command(MODULE),
            *ends,
            "--link",
            link,
            "--seed",
            str(seed),
        )
        spec = ProcessSpec(_NAME, command, module_env(), quiet=True)
        self._tree = ProcessTree([spec], log=lambda _: None, probe=self._ready)

    async def start(self) -> None:
        """Start it and wait until it listens.

        Raises:
            ConfigurationError: it cannot be started; the text holds its reason.
        """
        self._tree.start()
        try:
            await self._tree.ready()
        except BaseException:
            await self._tree.stop()
            raise
        self.listening = tuple(self._lines()[-1].split()[1:])

    async def stop(self) -> LinkReport:
        """End it; what it did."""
        await self._tree.stop()
        self.report = read_report(self._lines())
        return self.report

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _lines(self) -> list[str]:
        return list(self._tree.process(_NAME).last_lines)

    async def _ready(self) -> set[str]:
        return {_NAME} if any(line.startswith(READY) for line in self._lines()) else set()


def read_report(lines: Sequence[str]) -> LinkReport:
    """The report among a link's lines.

    Raises:
        LocalError: it did not end in order.
    """
    try:
        return msgspec.json.decode(lines[-1], type=LinkReport)
    except (IndexError, msgspec.DecodeError):
        raise LocalError(f"the link ended without a report; it said: {lines[-3:]}") from None
