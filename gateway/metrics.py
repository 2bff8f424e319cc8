"""Metrics of the gateway, under the names that vLLM gives them, with the prefix `e2sci:`.

Times are those an HTTP client sees, without its network. Labels have few values: never a user, a
client or a request.
"""

from __future__ import annotations

import time

from prometheus_client import Counter, Gauge, Histogram

from bus.runtime.metrics import LATENCIES_S, LONG_LATENCIES_S, process_registry
from bus.store import End

__all__ = ["AnswerTimes", "GatewayMetrics"]


class GatewayMetrics:
    """All metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = process_registry()
        self.http_requests = Counter(
            "e2sci:http_requests", "HTTP requests answered.", ["route", "method", "status"],
            registry=registry,
        )  # fmt: skip
        self.running = Gauge(
            "e2sci:num_requests_running", "Choices of which tokens have come.", registry=registry
        )
        self.waiting = Gauge(
            "e2sci:num_requests_waiting", "Choices submitted, without a token yet.",
            registry=registry,
        )  # fmt: skip
        self.success = Counter(
            "e2sci:request_success", "Choices that have ended.", ["finished_reason"],
            registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "e2sci:time_to_first_token_seconds", "From submission to the first token.",
            buckets=LONG_LATENCIES_S, registry=registry,
        )  # fmt: skip
        self.inter_token = Histogram(
            "e2sci:inter_token_latency_seconds",
            "Between two pieces of an answer, divided by the tokens of the later one.",
            buckets=LATENCIES_S, registry=registry,
        )  # fmt: skip
        self.latency = Histogram(
            "e2sci:e2e_request_latency_seconds", "From submission to the end.",
            buckets=LONG_LATENCIES_S, registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "e2sci:prompt_tokens", "Prompt tokens of choices that have ended.", registry=registry
        )
        self.generation_tokens = Counter(
            "e2sci:generation_tokens", "Tokens of choices that have ended.", registry=registry
        )
        self.loop_lag = Histogram(
            "e2sci:event_loop_lag_seconds", "How late a timer of the event loop fires.",
            buckets=LATENCIES_S, registry=registry,
        )  # fmt: skip


class AnswerTimes:
    """One choice: what happens to it, and when, into the metrics."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._gauge: Gauge | None = None
        self._submitted_at = 0.0
        self._last_at: float | None = None

    def submitted(self) -> None:
        self._submitted_at = time.monotonic()
        self._move_to(self._metrics.waiting)

    def arrived(self, num_tokens: int) -> None:
        """A piece has come."""
        if not num_tokens:
            return
        now = time.monotonic()
        if self._last_at is None:
            self._metrics.first_token.observe(now - self._submitted_at)
            self._move_to(self._metrics.running)
        else:
            self._metrics.inter_token.observe((now - self._last_at) / num_tokens)
        self._last_at = now

    def ended(self, end: End) -> None:
        metrics = self._metrics
        metrics.success.labels(end.finish_reason.value).inc()
        metrics.latency.observe(time.monotonic() - self._submitted_at)
        metrics.prompt_tokens.inc(end.usage.prompt_tokens)
        metrics.generation_tokens.inc(end.usage.completion_tokens)
        self._move_to(None)

    def closed(self) -> None:
        """Nothing more will be read of it, ended or not."""
        self._move_to(None)

    def _move_to(self, gauge: Gauge | None) -> None:
        if self._gauge is not None:
            self._gauge.dec()
        if gauge is not None:
            gauge.inc()
        self._gauge = gauge
