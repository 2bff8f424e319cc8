"""`python -m edge_worker`: one edge worker, settings by flags, E2SCI_* and e2sci.toml."""

from __future__ import annotations

from bus.runtime.worker import run_worker
from edge_worker.server import serve
from edge_worker.settings import EdgeSettings

if __name__ == "__main__":
    run_worker("edge", EdgeSettings, serve)
