"""Emulated links in front of cloud workers, to measure: processes of `launch.link`.

A worker listens on ports chosen here and advertises the link's; edges find those in the registry
and know of no link. This module does not know what links are like.
"""

from __future__ import annotations

from collections.abc import Sequence

from launch.link import MODULE, READY
from launch.ports import claim_port
from launch.python import module_command, module_env
from launch.supervisor import Log, ManagedProcess, ProcessSpec, ProcessTree, RestartPolicy

__all__ = ["Links"]

_HOST = "127.0.0.1"


class Links:
    """One link before each of some cloud workers, named `link-1` for `cloud-1` and so on.

    Args:
        clouds: the workers' process names.
        link: what it is like, see docs/link.md.
        seed: fixes jitter and loss.
        log, policy: as in `ProcessTree`.
    """

    def __init__(
        self,
        clouds: Sequence[str],
        link: str,
        seed: int,
        *,
        log: Log,
        policy: RestartPolicy | None = None,
    ) -> None:
        self._ports = {cloud: _Ports() for cloud in clouds}
        flags = ("--link", link, "--seed", str(seed))
        specs = [
            ProcessSpec(
                cloud.replace("cloud", "link"),
                (*module_command(MODULE), *ports.arguments(), *flags),
                module_env(),
                quiet=True,
            )
            for cloud, ports in self._ports.items()
        ]
        self._tree = ProcessTree(specs, log=log, probe=self._listening, policy=policy)

    @property
    def processes(self) -> tuple[ManagedProcess, ...]:
        """After `stop`, a process's last line is its report."""
        return self._tree.processes

    def cloud_env(self, cloud: str) -> dict[str, str]:
        """That worker's settings: where to listen and what to advertise."""
        ports = self._ports.get(cloud)
        return {} if ports is None else ports.cloud_env()

    async def start(self) -> None:
        """Start them and wait until they listen.

        Raises:
            ConfigurationError: one cannot be started; the text holds its reason.
        """
        self._tree.start()
        await self._tree.ready()

    async def stop(self) -> None:
        """End them. What passes through them is lost, so the workers stop first."""
        await self._tree.stop()
        for ports in self._ports.values():
            ports.close()

    async def _listening(self) -> set[str]:
        return {
            process.name
            for process in self._tree.processes
            if process.running and any(line.startswith(READY) for line in process.last_lines)
        }


class _Ports:
    """Four free ports, ours until `close`: two of a cloud worker, two of the link before it."""

    def __init__(self) -> None:
        self._claims = [claim_port() for _ in range(4)]

    def close(self) -> None:
        for claim in self._claims:
            claim.close()

    def arguments(self) -> tuple[str, ...]:
        windows, feedback, *fronts = (f"{_HOST}:{claim.port}" for claim in self._claims)
        pairs = zip(fronts, (windows, feedback), strict=True)
        return tuple(arg for front, to in pairs for arg in ("--listen", front, "--to", to))

    def cloud_env(self) -> dict[str, str]:
        names = ("windows", "feedback", "advertise_windows", "advertise_feedback")
        env = {
            f"E2SCI_{name.upper()}_PORT": str(claim.port)
            for name, claim in zip(names, self._claims, strict=True)
        }
        return {**env, "E2SCI_BIND_HOST": _HOST, "E2SCI_ADVERTISE_HOST": _HOST}
