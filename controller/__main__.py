"""`python -m controller`: the controller, settings by flags, E2SCI_* and e2sci.toml."""

from __future__ import annotations

from bus.runtime.worker import run_worker
from controller.server import serve
from controller.settings import ControllerSettings

if __name__ == "__main__":
    run_worker("controller", ControllerSettings, serve)
