"""Runs code that a model has written: a process of its own, with limits, and without a network.

What it may use: 10 s of CPU and as much of the clock again, 1 GiB of memory, files of at most 1 MiB
in an empty directory that is removed, no environment. A network namespace of its own has no
interface but an idle loopback, and what it starts dies with it. That keeps accidents in; it is no
fortress (the program can read what this user can read), so nobody runs it unasked.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bus.protocol.errors import ConfigurationError

CPU_S = 10
_MEMORY_BYTES = 1 << 30
_FILE_BYTES = 1 << 20
_PROBE_S = 10.0


class Sandbox:
    """`Sandbox()(program)` tells whether a Python program ends without an error.

    Raises:
        ConfigurationError: this machine has no `unshare`, or does not let this user have a network
            namespace.
    """

    def __init__(self) -> None:
        unshare = shutil.which("unshare")
        if unshare is None:
            raise ConfigurationError(
                "running a model's code needs unshare (package util-linux), to keep it off the "
                "network"
            )
        self._command = (
            unshare, "--user", "--net", "--pid", "--fork", "--kill-child",
            "--map-current-user", "--",
        )  # fmt: skip
        self._check()

    def __call__(self, program: str) -> bool:
        with tempfile.TemporaryDirectory(prefix="e2sci-sandbox-") as folder:
            path = Path(folder) / "program.py"
            path.write_text(program, "utf-8", errors="replace")
            try:
                done = subprocess.run(
                    [*self._command, sys.executable, "-I", "-B", str(path)],
                    cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, timeout=2 * CPU_S, check=False,
                    preexec_fn=_limit, start_new_session=True,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return False
        return done.returncode == 0

    def _check(self) -> None:
        done = subprocess.run(
            [*self._command, "true"], capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
        if done.returncode:
            raise ConfigurationError(
                f"running a model's code needs a network namespace, and this machine refuses one: "
                f"{done.stderr.strip()}"
            )


def _limit() -> None:
    """In the child, before it becomes the program."""
    for kind, most in (
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
