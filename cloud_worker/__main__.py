"""`python -m cloud_worker`: one cloud worker, settings by flags, E2SCI_* and e2sci.toml."""

from __future__ import annotations

from bus.runtime.worker import run_worker
from cloud_worker.server import serve
from cloud_worker.settings import CloudSettings

if __name__ == "__main__":
    run_worker("cloud", CloudSettings, serve)
