"""How a module of this project is started as a process, from wherever the user stands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["ROOT", "module_command", "module_env"]

ROOT = Path(__file__).resolve().parent.parent


def module_command(module: str) -> tuple[str, ...]:
    """`python -m module`."""
    # -P: a folder `engines` or `controller` where the user stands must not shadow our packages.
    return (sys.executable, "-P", "-m", module)


def module_env() -> dict[str, str]:
    """What it finds in its environment on top of ours."""
    # The packages are importable here, perhaps only because of where we were started.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
