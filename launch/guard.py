"""Become another program that the kernel kills the moment our parent dies.

Run as a script: `python -I -S guard.py PARENT_PID PROGRAM ARG…`. It asks the kernel for SIGKILL
at the parent's death (prctl PR_SET_PDEATHSIG, which survives exec) and then executes PROGRAM in
its own place, so the pid stays and no process is added. `kill -9` of the supervisor therefore
leaves nothing behind, whatever the program is: Valkey and Streamlit know nothing of us.

A `preexec_fn` would do the same inside the fork, where Python with threads may deadlock. The
kernel ties the signal to the *thread* that forked, so supervisors spawn from the thread whose
loop lives as long as they do. Linux only; elsewhere the workers' own watch over E2SCI_PARENT_PID
is what remains.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Arrange for SIGKILL when the process `parent_pid`, our parent, ends."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    if os.getppid() != parent_pid:  # it died before we asked
        raise SystemExit(f"the supervisor, process {parent_pid}, is gone; not starting")


def main() -> None:
    parent_pid, *command = sys.argv[1:]
    die_with_parent(int(parent_pid))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
