"""A tree of child processes: started together, restarted when they die, stopped together.

`ProcessTree` knows processes, signals and output lines. It does not know what the children do,
nor Redis or models; whoever builds the tree says when it is ready (a probe). Each child is in a
session of its own, so a terminal's Ctrl-C reaches only the supervisor, and behind `launch.guard`,
so it cannot outlive the supervisor even after kill -9.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from bus.protocol.errors import ConfigurationError, LocalError
from launch import guard
from launch.stall import StallWatch

__all__ = ["ManagedProcess", "ProcessSpec", "ProcessTree", "RestartPolicy"]

Log = Callable[[str], None]
"""Takes a line `<process name> | <text>`: a child's own, or what happened to the child."""
Probe = Callable[[], Awaitable[set[str]]]
"""Gives the names of the processes that are ready now."""

EXIT_CONFIGURATION = 2
"""A child that exits so is told wrongly what to do; starting it again cannot help."""
_PROBE_INTERVAL_S = 0.1
_STACKS_S = 0.5
_READ_BYTES = 2**16
_LONGEST_LINE = 2**20
_KEPT_LINES = 200


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One child of the tree.

    Attributes:
        name: unique in the tree.
        command: program and arguments.
        env: what it finds in its environment on top of ours.
        quiet: its lines are kept for a report of its failure and not logged.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How long a dead child waits: `first_s`, doubling to `max_s`, as new after `reset_after_s` up.

    Before the tree is ready a child that makes no progress for `stall_s` is killed
    (`launch.stall`), and one that dies `start_attempts` times in a row ends the start.
    """

    first_s: float = 0.5
    max_s: float = 10.0
    reset_after_s: float = 30.0
    start_attempts: int = 3
    stall_s: float = 60.0

    def next_delay_s(self, previous_s: float | None, uptime_s: float) -> float:
        """Seconds until the next start, from the delay before this run and how long it ran."""
        if previous_s is None or uptime_s >= self.reset_after_s:
            return self.first_s
        return min(2 * previous_s, self.max_s)


class ManagedProcess:
    """One child through all its restarts."""

    def __init__(self, spec: ProcessSpec, policy: RestartPolicy, log: Log) -> None:
        self.spec = spec
        self.boot = ""
        """Random, new at each start: what the child finds as E2SCI_BOOT."""
        self.starts = 0
        """How often it has been started, the first time included."""
        self.exit_status: int | None = None
        """How the last run ended: exit status, or minus the signal; None while it never has."""
        self.last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        """What it wrote last, over all its runs."""
        self._policy = policy
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._stopping = False
        self._settled = False

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        """Process id of the running child.

        Raises:
            LocalError: it is not running now (between two starts, or stopped).
        """
        if self._process is None:
            raise LocalError(f"{self.name} is not running; wait_started() waits for its next start")
        return self._process.pid

    @property
    def failed(self) -> bool:
        """Whether it cannot be brought up: misconfigured, or dying again and again at start."""
        return self._task is not None and self._task.done() and not self._stopping

    async def wait_started(self, starts: int = 1) -> None:
        """Wait until it runs and has been started at least `starts` times."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.running and self.starts >= starts)

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise(), name=f"supervise {self.name}")

    def settle(self) -> None:
        """From now on it is restarted however often it dies: its start has succeeded."""
        self._settled = True

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, up to `grace_s` to finish, then SIGKILL to its whole process group."""
        self._stopping = True
        if self._task is None:
            return
        if self._process is None:
            self._task.cancel()  # it waits for its next start, or has failed for good
        else:
            self._signal(signal.SIGTERM)
        done, _ = await asyncio.wait({self._task}, timeout=grace_s)
        if not done:
            self._say(f"still running {grace_s:g} s after SIGTERM; killed")
            self.kill()
            await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.result()  # an error of the supervision itself is a bug and must show

    async def restart_stalled(self, stall_s: float) -> None:
        """SIGKILL; it is started again as one that has died. Its stacks are logged first, where it
        writes them on SIGUSR1, as our workers do."""
        self._say(f"no progress for {stall_s:g} s while it starts; killed")
        self._signal(signal.SIGUSR1)
        await asyncio.sleep(_STACKS_S)
        self._signal(signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL at once; it is not started again."""
        self._stopping = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):  # it ended by itself just now
                if number == signal.SIGKILL:
                    os.killpg(self._process.pid, number)
                else:  # the program alone decides how it drains its own children
                    self._process.send_signal(number)

    async def _supervise(self) -> None:
        delay_s: float | None = None
        while not self._stopping:
            began = time.monotonic()
            await self._run_once()
            if self._is_final():
                return
            delay_s = self._policy.next_delay_s(delay_s, time.monotonic() - began)
            self._say(f"{self._how_it_ended()}; starting it again in {delay_s:g} s")
            await asyncio.sleep(delay_s)

    def _is_final(self) -> bool:
        """Whether the run that just ended was the last."""
        if self._stopping:
            return True
        if self.exit_status == EXIT_CONFIGURATION:
            self._say("stopped: its configuration is wrong; not started again")
            return True
        if not self._settled and self.starts >= self._policy.start_attempts:
            self._say(f"{self._how_it_ended()}, {self.starts} times; given up")
            return True
        return False

    async def _run_once(self) -> None:
        read_fd, write_fd = os.pipe()
        self.boot = secrets.token_hex(8)
        try:
            # Our own pipe, not asyncio's: with that, wait() lasts until every heir of the pipe
            # has closed it (CPython before 3.12.4), and a grandchild could hide a death.
            process = await asyncio.create_subprocess_exec(
                *_guarded(self.spec.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_fd,
                stderr=write_fd,
                env={**os.environ, **_start_env(self.boot), **self.spec.env},
                start_new_session=True,
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        relay = asyncio.create_task(self._relay(read_fd))
        self.starts += 1
        try:
            await self._announce(process)
            if self._stopping:  # kill() came while it was being started
                self.kill()
            self.exit_status = await process.wait()
        finally:
            with suppress(ProcessLookupError):  # what it left behind goes with it
                os.killpg(process.pid, signal.SIGKILL)
            await self._announce(None)
            await relay

    async def _announce(self, process: asyncio.subprocess.Process | None) -> None:
        async with self._changed:
            self._process = process
            self._changed.notify_all()

    async def _relay(self, read_fd: int) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", buffering=0)
        )
        rest = b""
        try:
            while data := await reader.read(_READ_BYTES):
                *lines, rest = (rest + data).split(b"\n")
                if len(rest) > _LONGEST_LINE:
                    lines, rest = [*lines, rest], b""
                self._take_lines(lines)
            self._take_lines([rest])
        finally:
            transport.close()

    def _take_lines(self, lines: Sequence[bytes]) -> None:
        for raw in lines:
            if line := raw.decode(errors="replace").rstrip():
                self.last_lines.append(line)
                if not self.spec.quiet:
                    self._say(line)

    def _say(self, text: str) -> None:
        self._log(f"{self.name} | {text}")

    def _how_it_ended(self) -> str:
        status = self.exit_status
        if status is not None and status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exited with status {status}"


def _start_env(boot: str) -> dict[str, str]:
    return {"E2SCI_PARENT_PID": str(os.getpid()), "E2SCI_BOOT": boot}


def _guarded(command: Sequence[str]) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *command)


class ProcessTree:
    """All children of one supervisor.

    `async with ProcessTree(specs) as tree:` starts them, `await tree.ready()` waits for the
    probe, and leaving the block stops them.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        log: Log,
        probe: Probe | None = None,
        policy: RestartPolicy | None = None,
        grace_s: float = 10.0,
    ) -> None:
        policy = policy or RestartPolicy()
        self._processes = {spec.name: ManagedProcess(spec, policy, log) for spec in specs}
        if len(self._processes) != len(specs):
            raise LocalError("two processes of one tree have the same name")
        self._stall = StallWatch(policy.stall_s)
        self._probe = probe or self._running
        self._grace_s = grace_s

    @property
    def processes(self) -> tuple[ManagedProcess, ...]:
        return tuple(self._processes.values())

    def process(self, name: str) -> ManagedProcess:
        """The child of this name.

        Raises:
            LocalError: there is none.
        """
        try:
            return self._processes[name]
        except KeyError:
            known = ", ".join(self._processes)
            raise LocalError(f"no process {name!r} in this tree; there are {known}") from None

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def start(self) -> None:
        for process in self.processes:
            process.start()

    async def ready(self) -> None:
        """Wait until the probe has seen every child at once.

        Raises:
            ConfigurationError: a child cannot be brought up; the text holds its last line.
        """
        while not (ready := await self._probe()).issuperset(self._processes):
            for process in self.processes:
                if process.failed:
                    raise ConfigurationError(_failure_text(process))
                if process.name not in ready:
                    await self._restart_if_stalled(process)
            await asyncio.sleep(_PROBE_INTERVAL_S)
        for process in self.processes:
            process.settle()

    async def _restart_if_stalled(self, process: ManagedProcess) -> None:
        if process.running and self._stall.stalled(process.name, process.pid):
            await process.restart_stalled(self._stall.limit_s)

    async def stop(self) -> None:
        """SIGTERM to all, up to the grace period to finish, SIGKILL to the rest.

        Cancelled (a second Ctrl-C), it kills at once, collects the dead and re-raises.
        """
        try:
            await asyncio.gather(*(process.stop(self._grace_s) for process in self.processes))
        except asyncio.CancelledError:
            for process in self.processes:
                process.kill()
            await asyncio.gather(*(process.stop(self._grace_s) for process in self.processes))
            raise

    async def _running(self) -> set[str]:
        return {process.name for process in self.processes if process.running}


def _failure_text(process: ManagedProcess) -> str:
    last_words = process.last_lines[-1] if process.last_lines else "it wrote nothing"
    return f"{process.name} could not be started: {last_words}"
