"""`/metrics` and `/health` of one worker, served by threads of their own, and its spans.

A scrape reads and renders in its thread, and the event loop does not wait for it. Health is what
the loop has noted last:

    live    the event loop has run within the last `STUCK_S`
    ready   live, and every part that was noted has no reason against it

    GET /metrics        the exposition format that the client asks for; with `?prefix=e2sci_`
                        names without a colon
    GET /health         {"live": …, "ready": …, "reasons": […]}; 200 where ready, else 503
    GET /health/live    the same; 200 where live
    GET /health/ready   as /health

Where `metrics_port` is not set, nothing listens and nothing is checked.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from bus.protocol.errors import ConfigurationError, StoreUnavailableError
from bus.runtime.metrics import LATENCIES_S, Metrics, exposition, measure_loop_lag
from bus.runtime.tracing import Tracing
from bus.store import Store, WorkerRecord

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Endpoint", "Health", "Monitor"]

log = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0
STUCK_S = 10.0
"""An event loop that has not run for so long is not live [ours]."""
CLIENT_S = 5.0
"""A client that sends no request for so long is dropped."""
STARTING = "start", "the worker is starting"
REDIS = "redis"

Check = Callable[[Sequence[WorkerRecord]], str]
"""Why a worker is not ready, given those that live; "" where it is."""


class Health:
    """Why this process is not ready, by part; and when its event loop last ran."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = dict((STARTING,))
        self._beat_s = time.monotonic()

    def note(self, part: str, reason: str = "") -> None:
        """A part has this reason not to be ready, or none."""
        self._reasons[part] = reason

    def beat(self) -> None:
        """The event loop runs."""
        self._beat_s = time.monotonic()

    @property
    def live(self) -> bool:
        return time.monotonic() - self._beat_s < STUCK_S

    def report(self) -> dict[str, Any]:
        """As `/health` shows it."""
        live = self.live
        reasons = [reason for reason in list(self._reasons.values()) if reason]
        if not live:
            reasons.append(f"the event loop has not run for more than {STUCK_S:g} s")
        return {"live": live, "ready": not reasons, "reasons": reasons}


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Without the look-up of the host's name, which may wait for DNS."""
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """A scrape is not worth a line."""


class Endpoint:
    """The HTTP server of one process.

    Args:
        port: 0 takes a free one.

    Raises:
        ConfigurationError: it cannot listen there.
    """

    def __init__(self, host: str, port: int, metrics: Metrics, health: Health) -> None:
        kind = _Server6 if ":" in host else _Server
        app = application(metrics, health)
        try:
            self._server = make_server(host, port, app, kind, _Handler)
        except OSError as error:
            raise ConfigurationError(f"metrics: cannot listen on {host}:{port}: {error}") from error
        self.port: int = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def application(metrics: Metrics, health: Health) -> WSGIApplication:
    """What answers requests (see the module)."""

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            (prefix,) = parse_qs(environ["QUERY_STRING"]).get("prefix", [""])[:1]
            accept = environ.get("HTTP_ACCEPT", "")
            return _answer(start, 200, *exposition(metrics.registry, accept, prefix))
        report = health.report()
        if path == "/health/live":
            return _json(start, 200 if report["live"] else 503, report)
        if path in ("/health", "/health/ready"):
            return _json(start, 200 if report["ready"] else 503, report)
        pages = "/metrics, /health, /health/live, /health/ready"
        return _json(start, 404, {"error": f"no such page; there are {pages}"})

    return answer


def _json(start: StartResponse, status: int, content: dict[str, Any]) -> list[bytes]:
    return _answer(start, status, json.dumps(content).encode() + b"\n", "application/json")


def _answer(start: StartResponse, status: int, body: bytes, content_type: str) -> list[bytes]:
    headers = [("Content-Type", content_type), ("Content-Length", str(len(body)))]
    start(f"{status} {HTTPStatus(status).phrase}", headers)
    return [body]


class Monitor:
    """Metrics and health of one process, and the endpoint that shows them.

    Attributes:
        metrics: what the worker adds its own to. tracing: makes its spans.
        url: of `/metrics`, as others reach it; "" where nothing listens.

    Args:
        port: 0 takes a free one, None starts nothing.
        public_host: the address in `url`; where empty, `host`.

    Raises:
        ConfigurationError: as `Endpoint`.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int | None = None, public_host: str = "",
        tracing: Tracing | None = None,
    ) -> None:  # fmt: skip
        self.metrics = Metrics()
        self.tracing = tracing or Tracing()
        self.health = Health()
        self.url = ""
        self._lag_s = self.metrics.histogram(
            "event_loop_lag_seconds", "How much later than due the event loop runs.", LATENCIES_S
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._endpoint: Endpoint | None = None
        if port is not None:
            self._endpoint = Endpoint(host, port, self.metrics, self.health)
            name = public_host or host
            name = f"[{name}]" if ":" in name else name
            self.url = f"http://{name}:{self._endpoint.port}/metrics"
            self._start(measure_loop_lag(self._lagged))

    def follow(self, store: Store, check: Check) -> None:
        """From now on ask every second whether Redis answers and what `check` says of the workers
        that live; the worker has started."""
        self.health.note(STARTING[0])
        if self._endpoint is not None:
            self.health.note(REDIS, "Redis has not answered yet")
            self._start(self._check_forever(store, check))

    def close(self) -> None:
        """Stop checking and listening; send the spans that wait."""
        for task in self._tasks:
            task.cancel()
        if self._endpoint is not None:
            self._endpoint.close()
        self.tracing.close()

    def _start(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.health.note("monitor", f"the health check failed: {error}")
            log.error("the health check failed", exc_info=error)

    def _lagged(self, lag_s: float) -> None:
        """The event loop runs."""
        self._lag_s.observe(lag_s)
        self.health.beat()

    async def _check_forever(self, store: Store, check: Check) -> None:
        while True:
            try:
                workers = await store.registry.workers()
            except StoreUnavailableError as error:
                self.health.note(REDIS, str(error))
            else:
                self.health.note(REDIS)
                self.health.note("worker", check(workers))
            await asyncio.sleep(CHECK_EVERY_S)
