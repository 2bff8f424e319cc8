"""The whole system as one process tree: Valkey, controller, workers, gateway, dashboard.

`Stack` is what `e2sci up`, `e2sci generate`, the demo and the tests start. It knows which
processes there are, what they are told through the environment, and that a worker is ready once
it has a live record in the registry. It does not know what the workers do.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bus.protocol.errors import LocalError, StoreUnavailableError
from bus.settings import BusSettings
from bus.store import Store, WorkerRecord
from launch.embedded import EmbeddedServer
from launch.links import Links
from launch.ports import PortClaim, claim_port
from launch.python import ROOT, module_command, module_env
from launch.supervisor import Log, ManagedProcess, ProcessSpec, ProcessTree, RestartPolicy

DASHBOARD = "dashboard"
DEFAULT_DASHBOARD_PORT = 8501
GATEWAY = "gateway"
DEFAULT_GATEWAY_PORT = 8000
_HEALTH_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What to start.

    Attributes:
        cloud, edge, middle: how many workers of each role.
        pair: a named pair, as `engines.catalog.registry` knows it; None is the default pair.
        target, draft: models, as `engines.catalog.sources` takes them; None takes the pair's.
        middle_model: of the middle workers; None takes the draft.
        speculator: of the cloud workers, as their setting takes it; None leaves it to that.
        dtype: number format of all models.
        window: tokens drafted at a time; None leaves it to the controller's settings.
        drafter: who drafts (`engines.kinds.DrafterKind`); None leaves it to the edges' settings.
        threads: CPU threads of each model worker; None shares the cores among them.
        redis_url: an existing Redis; None starts the embedded Valkey.
        data_dir: where the embedded Valkey keeps its data beyond this run.
        dashboard_port: first port to try for the dashboard; None starts none.
        gateway_port: first port to try for the gateway, on loopback; None starts none.
        log_level: of all workers; None leaves it to the settings.
        link: an emulated link in front of each cloud worker, to measure: a profile, a round trip
            such as `40ms` or a trace file (docs/link.md); None is this machine's loopback.
        link_seed: fixes the links' jitter and loss.
    """

    cloud: int = 1
    edge: int = 1
    middle: int = 0
    pair: str | None = None
    target: str | None = None
    draft: str | None = None
    middle_model: str | None = None
    speculator: str | None = None
    dtype: str = "auto"
    window: int | None = None
    drafter: str | None = None
    threads: int | None = None
    redis_url: str | None = None
    data_dir: Path | None = None
    dashboard_port: int | None = None
    gateway_port: int | None = None
    log_level: str | None = None
    link: str | None = None
    link_seed: int = 0

    @property
    def threads_each(self) -> int:
        if self.threads is not None:
            return self.threads
        return max(1, len(os.sched_getaffinity(0)) // max(1, self.num_models))

    @property
    def num_models(self) -> int:
        """Workers that run one."""
        return self.cloud + self.middle + self.edge


class Stack:
    """All processes of one installation on this machine.

    `await start()` returns once every worker is registered; `await stop()` drains and ends them.
    Processes are named `valkey`, `controller`, `link-1` …, `cloud-1` …, `middle-1` …, `edge-1` …,
    `gateway`, `dashboard`;
    `link-1` stands before `cloud-1`, and its last line after `stop` is its report. With the
    embedded Valkey these are the workers' ids too; in a Redis shared with other machines the ids
    get a suffix (`worker_id`).
    """

    def __init__(
        self,
        options: StackOptions | None = None,
        *,
        log: Log,
        quiet: bool = False,
        policy: RestartPolicy | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        """A stack, not started yet.

        Args:
            log: takes lines `<process name> | <text>`: the workers' own and news of restarts.
            quiet: log only the latter.
            policy: how dead processes are restarted.
            env: more environment for all processes.
        """
        self.options = options or StackOptions()
        self._log = log
        self._quiet = quiet
        self._policy = policy
        self._env = env or {}
        self._suffix = _suffix() if self.options.redis_url else ""
        self._server: EmbeddedServer | None = None
        self._store: Store | None = None
        self._tree: ProcessTree | None = None
        self._dashboard: PortClaim | None = None
        self._gateway: PortClaim | None = None
        self._links: Links | None = None

    @property
    def redis_url(self) -> str:
        """Where the queue is; with the embedded Valkey known only after `start`."""
        if self._server is not None:
            return self._server.url
        if self.options.redis_url is None:
            raise LocalError("the stack has no Redis before start()")
        return self.options.redis_url

    @property
    def dashboard_url(self) -> str | None:
        return None if self._dashboard is None else f"http://127.0.0.1:{self._dashboard.port}"

    @property
    def gateway_url(self) -> str | None:
        return None if self._gateway is None else f"http://127.0.0.1:{self._gateway.port}"

    @property
    def processes(self) -> tuple[ManagedProcess, ...]:
        """Every child, the embedded Valkey first."""
        server = () if self._server is None else (self._server.process,)
        links = () if self._links is None else self._links.processes
        return server + links + (() if self._tree is None else self._tree.processes)

    def process(self, name: str) -> ManagedProcess:
        """The child of this name.

        Raises:
            LocalError: there is none.
        """
        for process in self.processes:
            if process.name == name:
                return process
        known = ", ".join(process.name for process in self.processes)
        raise LocalError(f"no process {name!r} in this stack; there are {known}")

    def worker_id(self, name: str) -> str:
        """The registry's id of the worker that runs as process `name`."""
        return name + self._suffix

    @property
    def worker_names(self) -> tuple[str, ...]:
        return (
            "controller",
            *(f"cloud-{number + 1}" for number in range(self.options.cloud)),
            *(f"middle-{number + 1}" for number in range(self.options.middle)),
            *(f"edge-{number + 1}" for number in range(self.options.edge)),
        )

    async def start(self) -> None:
        """Start everything and wait until it is ready.

        Raises:
            ConfigurationError: a process cannot be brought up, or Redis refuses us.
            StoreUnavailableError: the given Redis does not answer.
        """
        try:
            if self.options.redis_url is None:
                self._server = EmbeddedServer(self._log, self.options.data_dir)
                await self._server.start()
            self._store = await Store.connect(BusSettings.load(redis_url=self.redis_url))
            if self.options.dashboard_port is not None:
                self._dashboard = claim_port(self.options.dashboard_port)
            if self.options.gateway_port is not None:
                self._gateway = claim_port(self.options.gateway_port)
            if self.options.link is not None:
                self._links = Links(
                    [name for name in self.worker_names if name.startswith("cloud")],
                    self.options.link,
                    self.options.link_seed,
                    log=self._log,
                    policy=self._policy,
                )
                await self._links.start()
            self._tree = ProcessTree(
                self._specs(), log=self._log, probe=self._ready_names, policy=self._policy
            )
            self._tree.start()
            await self._tree.ready()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Drain and end the workers, then the embedded Valkey. Cancelled, it kills instead."""
        async with AsyncExitStack() as exits:  # ended in the opposite order, whatever one raises
            if self._server is not None:
                exits.push_async_callback(self._server.stop)
            if self._links is not None:
                exits.push_async_callback(self._links.stop)
            for claim in (self._dashboard, self._gateway):
                if claim is not None:
                    exits.callback(claim.close)
            if self._store is not None:
                exits.push_async_callback(self._store.close)
            if self._tree is not None:
                exits.push_async_callback(self._tree.stop)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _specs(self) -> list[ProcessSpec]:
        specs = [
            ProcessSpec(name, module_command(_module(name)), self._worker_env(name), self._quiet)
            for name in self.worker_names
        ]
        if self._gateway is not None:
            # No keys, hence loopback alone, wherever the environment would have it listen.
            env = {"E2SCI_HOST": "127.0.0.1", "E2SCI_PORT": str(self._gateway.port)}
            env |= self._shared_env()
            specs.append(ProcessSpec(GATEWAY, module_command(GATEWAY), env, self._quiet))
        if self._dashboard is not None:
            command = _streamlit_command(self._dashboard.port)
            specs.append(ProcessSpec(DASHBOARD, command, self._shared_env(), quiet=True))
        return specs

    def _shared_env(self) -> dict[str, str]:
        env = {"E2SCI_REDIS_URL": self.redis_url, **module_env()}
        if self.options.log_level is not None:
            env["E2SCI_LOG_LEVEL"] = self.options.log_level
        return {**env, **self._env}

    def _worker_env(self, name: str) -> dict[str, str]:
        options = self.options
        env = {
            "E2SCI_WORKER_ID": self.worker_id(name),
            # Empty is unset, whatever the environment around us says.
            "E2SCI_PAIR": options.pair or "",
            "E2SCI_TARGET": options.target or "",
            "E2SCI_DRAFT": options.draft or "",
            "E2SCI_DTYPE": options.dtype,
            "E2SCI_THREADS": str(options.threads_each),
            "E2SCI_METRICS_PORT": "0",  # any free one, as the registry's record says
        }
        if options.speculator is not None:
            env["E2SCI_SPECULATOR"] = options.speculator
        if options.window is not None:
            env["E2SCI_WINDOW"] = str(options.window)
        if options.drafter is not None:
            env["E2SCI_DRAFTER"] = options.drafter
        if self._links is not None:
            env |= self._links.cloud_env(name)
        env |= self._shared_env()
        return env | self._middle_env(env) if name.startswith("middle") else env

    def _middle_env(self, env: dict[str, str]) -> dict[str, str]:
        """A middle worker runs a draft: measured as on another device, its passes take what a
        draft's steps take."""
        steps = {"E2SCI_LEAST_STEP_MS": "E2SCI_LEAST_PASS_MS",
                 "E2SCI_STEP_COUNTS": "E2SCI_PASS_COUNTS"}  # fmt: skip
        return {
            "E2SCI_TARGET": self.options.middle_model or self.options.draft or "",
            **{passes: env[step] for step, passes in steps.items() if step in env},
        }

    async def records(self) -> dict[str, WorkerRecord]:
        """The registry's records of the workers that run now, by process name.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        if self._store is None or self._tree is None:
            return {}
        found = {record.worker_id: record for record in await self._store.registry.workers()}
        mine = ((process, found.get(self.worker_id(process.name))) for process in self.processes)
        return {
            process.name: record
            for process, record in mine
            # Another boot is that of an earlier process of the same id.
            if record is not None and process.running and record.boot == process.boot
        }

    async def metrics_urls(self) -> dict[str, str]:
        """Process name → address of its `/metrics`, of those that run and have one.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        found = {name: record.metrics_url for name, record in (await self.records()).items()}
        if self.gateway_url is not None:
            found[GATEWAY] = f"{self.gateway_url}/metrics"
        return {name: url for name, url in found.items() if url}

    async def _ready_names(self) -> set[str]:
        try:
            ready = set(await self.records())
        except StoreUnavailableError:  # the server may be being restarted
            return set()
        if self._dashboard and await _is_healthy(self._dashboard.port, "/_stcore/health"):
            ready.add(DASHBOARD)
        if self._gateway and await _is_healthy(self._gateway.port, "/health/live"):
            ready.add(GATEWAY)
        return ready


def _module(name: str) -> str:
    modules = {"cloud": "cloud_worker", "middle": "cloud_worker.middle", "edge": "edge_worker"}
    role = name.partition("-")[0]
    return modules.get(role, role)


def _suffix() -> str:
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:32]
    return f"-{host}-{secrets.token_hex(2)}"


def _streamlit_command(port: int) -> tuple[str, ...]:
    settings = {
        "server.port": str(port),
        "server.address": "127.0.0.1",
        "server.headless": "true",
        "server.fileWatcherType": "none",
        # A full collection after every refresh of a fragment is most of what a viewer would cost.
        "runner.postScriptGC": "false",
        "browser.gatherUsageStats": "false",
    }
    app = ROOT / "dashboard" / "app.py"
    flags = (f"--{name}={value}" for name, value in settings.items())
    return (*module_command("streamlit"), "run", str(app), *flags)


async def _is_healthy(port: int, path: str) -> bool:
    """Whether a server on loopback answers its health check with 200."""
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode())
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
