"""Requests as OpenTelemetry spans, sent over OTLP by HTTP: the extra `otel`.

    request    at the edge, from claim to end; an event for each judged window
      prefill  from claim to the first tokens
      session  at the cloud, from opening to closing; an event for each pass

The parent of `request` is the request's `traceparent`; the edge sends that of its own span to the
cloud. A span keeps its last `MOST_EVENTS` events. Spans leave from a thread of the SDK's; what the
collector does not take is dropped.

Without an endpoint nothing of OpenTelemetry is imported, and `Tracing.span` gives a `Span` that
does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bus.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OtelSpan

__all__ = ["MOST_EVENTS", "Span", "Tracing", "find_tracing"]

log = logging.getLogger(__name__)

MOST_EVENTS = 256
"""Of a span; older ones are dropped and counted by the SDK."""
EXPORT_S = 3.0
"""Most seconds for one export, repeats included; a worker that leaves waits no longer [ours]."""
Value = str | int | float | bool


class Span:
    """A span that is not recorded.

    Attributes:
        traceparent: what its children name as their parent.
    """

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent

    @property
    def recorded(self) -> bool:
        """Whether events are kept: where not, they need not be made."""
        return False

    def event(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Something has happened now."""

    def end(self, attributes: Mapping[str, Value] | None = None, error: str = "") -> None:
        """It is over. A second end changes nothing.

        Args:
            error: why it has failed; "" where it has not.
        """


class _RecordedSpan(Span):
    """A span of the SDK."""

    def __init__(self, span: OtelSpan) -> None:
        context = span.get_span_context()
        super().__init__(
            f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        )
        self._span = span

    @property
    def recorded(self) -> bool:
        return self._span.is_recording()

    def event(self, name: str, attributes: Mapping[str, Value]) -> None:
        self._span.add_event(name, attributes)

    def end(self, attributes: Mapping[str, Value] | None = None, error: str = "") -> None:
        if not self._span.is_recording():
            return
        from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415 - an optional package

        self._span.set_attributes(attributes or {})
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


class Tracing:
    """Makes spans of one process; this one records none."""

    def span(
        self,
        name: str,
        traceparent: str,
        attributes: Mapping[str, Value],  # noqa: ARG002 - recorded where spans are
    ) -> Span:
        """A span that begins now.

        Args:
            traceparent: W3C header value of its parent; "" begins a trace.
        """
        del name
        return Span(traceparent)

    def close(self) -> None:
        """Send what waits."""


class _Recording(Tracing):
    """Spans by a provider of the SDK."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("e2sci")

    def span(self, name: str, traceparent: str, attributes: Mapping[str, Value]) -> Span:
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
            TraceContextTextMapPropagator,
        )

        carrier = {"traceparent": traceparent} if traceparent else {}
        context = TraceContextTextMapPropagator().extract(carrier)
        return _RecordedSpan(self._tracer.start_span(name, context, attributes=attributes))

    def close(self) -> None:
        self._provider.shutdown()


def find_tracing(endpoint: str, service: str, instance: str) -> Tracing:
    """Tracing as set.

    Args:
        endpoint: of a collector, e.g. http://127.0.0.1:4318; "" records nothing.
        service, instance: what the spans' resource is named, e.g. `e2sci-edge`, `edge-1`.

    Raises:
        ConfigurationError: there is an endpoint, and the extra `otel` is not installed.
    """
    if not endpoint:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
    except ImportError as error:
        raise ConfigurationError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set and OpenTelemetry is not installed; install "
            "e2sci[otel], or unset it"
        ) from error
    log.info("spans go to %s", endpoint)
    exporter = OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces", timeout=EXPORT_S)
    return recording(exporter, service, instance, batch=True)


def recording(exporter: SpanExporter, service: str, instance: str, batch: bool = False) -> Tracing:
    """Tracing by an exporter of the SDK.

    Args:
        batch: export from a thread, many spans at once; else each one as it ends.
    """
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import (  # noqa: PLC0415
        BatchSpanProcessor,
        SimpleSpanProcessor,
    )

    provider = TracerProvider(
        resource=Resource.create({"service.name": service, "service.instance.id": instance}),
        span_limits=SpanLimits(max_events=MOST_EVENTS),
        shutdown_on_exit=False,  # `close` does it
    )
    processor = BatchSpanProcessor if batch else SimpleSpanProcessor
    provider.add_span_processor(processor(exporter))
    return _Recording(provider)
