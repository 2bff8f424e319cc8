"""Spans as the SDK keeps them, and as they arrive at a collector."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from bus.protocol.errors import ConfigurationError
from bus.runtime.tracing import MOST_EVENTS, Tracing, find_tracing, recording
from bus.runtime.worker import WorkerSettings

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.fixture
def kept() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def test_spans_are_children_of_their_traceparent(kept: InMemorySpanExporter) -> None:
    tracing = recording(kept, "e2sci-edge", "edge-1")
    request = tracing.span("request", PARENT, {"method": "sd"})
    prefill = tracing.span("prefill", request.traceparent, {})
    prefill.end()
    request.event("window", {"drafted": 4})
    request.end({"tokens": 7})
    request.end({"tokens": 8}, "a second end changes nothing")
    inner, outer = kept.get_finished_spans()
    assert (inner.name, outer.name) == ("prefill", "request")
    assert outer.context is not None
    assert outer.parent is not None
    assert inner.parent is not None
    assert f"{outer.context.trace_id:032x}" == "a" * 32
    assert f"{outer.parent.span_id:016x}" == "b" * 16
    assert inner.parent.span_id == outer.context.span_id
    assert dict(outer.attributes or {}) == {"method": "sd", "tokens": 7}
    assert [(event.name, dict(event.attributes or {})) for event in outer.events] == [
        ("window", {"drafted": 4})
    ]
    assert outer.status.status_code is StatusCode.UNSET
    assert outer.resource.attributes["service.name"] == "e2sci-edge"


def test_a_failure_is_a_status(kept: InMemorySpanExporter) -> None:
    recording(kept, "e2sci-edge", "edge-1").span("request", "", {}).end(error="no room")
    (span,) = kept.get_finished_spans()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "no room")


def test_a_span_keeps_its_last_events(kept: InMemorySpanExporter) -> None:
    span = recording(kept, "e2sci-cloud", "cloud-1").span("session", "", {})
    for number in range(MOST_EVENTS + 10):
        span.event("pass", {"number": number})
    span.end()
    (finished,) = kept.get_finished_spans()
    numbers = [dict(event.attributes or {})["number"] for event in finished.events]
    assert numbers == list(range(10, MOST_EVENTS + 10))


def test_without_an_endpoint_nothing_is_recorded() -> None:
    tracing = find_tracing("", "e2sci-edge", "edge-1")
    span = tracing.span("request", PARENT, {})
    assert type(tracing) is Tracing
    assert span.traceparent == PARENT
    assert not span.recorded
    span.event("window", {})
    span.end()
    tracing.close()


def test_without_an_endpoint_nothing_is_imported() -> None:
    """redis imports other parts of the SDK, where it is installed."""
    program = (
        "import sys; from bus.runtime.worker import WorkerSettings; "
        "WorkerSettings.load().monitor('edge').tracing.span('request', '', {}).end(); "
        "parts = ('opentelemetry.sdk.trace', 'opentelemetry.exporter'); "
        "print([name for name in sys.modules if name.startswith(parts)])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.strip() == "[]"


def test_an_endpoint_without_the_extra_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigurationError, match=r"install e2sci\[otel\]"):
        find_tracing("http://127.0.0.1:4318", "e2sci-edge", "edge-1")


class Collector:
    """Takes what is sent over OTLP by HTTP."""

    def __init__(self) -> None:
        self.received: list[tuple[str, bytes]] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append((self.path, body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "E2SCI_OTEL_ENDPOINT"])
def test_spans_arrive_at_a_collector(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    monkeypatch.setenv(name, collector.url)
    monitor = WorkerSettings.load(worker_id="edge-1").monitor("edge")
    monitor.tracing.span("request", PARENT, {"method": "sd"}).end()
    monitor.close()
    ((path, body),) = collector.received
    assert path == "/v1/traces"
    sent = ExportTraceServiceRequest.FromString(body).resource_spans[0]
    names = {item.key: item.value.string_value for item in sent.resource.attributes}
    assert names["service.instance.id"] == "edge-1"
    (span,) = sent.scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == (
        "request", "a" * 32, "b" * 16,
    )  # fmt: skip


def test_the_endpoint_is_a_setting_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert WorkerSettings.load().otel_endpoint == ""
    assert WorkerSettings.load(otel_endpoint="http://h:1").otel_endpoint == "http://h:1"
    assert WorkerSettings.from_cli(["--otel-endpoint", "http://h:2"]).otel_endpoint == "http://h:2"
