"""`python -m cloud_worker.middle`: a cloud worker that stands between draft and target.

It serves inner sessions of edges (docs/method.md, PipeSpec): its text are drafts. It reports to no
controller, as no request is its own.
"""

from __future__ import annotations

from bus.runtime.worker import run_worker
from cloud_worker.server import serve
from cloud_worker.settings import MiddleSettings

if __name__ == "__main__":
    run_worker("middle", MiddleSettings, serve)
