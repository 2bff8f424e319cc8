"""Metrics of one process: what a scrape of `/metrics` reads, and names that all roles share.

Counters and gauges are not kept here. Each is a function that reads, at the time of a scrape, what
the worker counts anyway; so counting costs the token path an addition of plain numbers. Only
histograms hold numbers of their own. Each of them belongs to one thread, which observes without a
lock; the scrape's thread reads.

Names follow vLLM's where the quantity is the same, with the prefix `e2sci:`. Labels have few
values: never a user, a client or a request.
"""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from bus.transport.sockets import Traffic

__all__ = [
    "COUNTS",
    "LATENCIES_S",
    "LONG_LATENCIES_S",
    "PLAIN_PREFIX",
    "PREFIX",
    "Histogram",
    "Metrics",
    "Reading",
    "exposition",
    "measure_loop_lag",
    "process_registry",
    "register_shared",
]

PREFIX = "e2sci:"
PLAIN_PREFIX = "e2sci_"
"""Of the same names for those who keep to Prometheus' rule that a colon belongs to recording rules;
vLLM does not, and we follow vLLM."""
_NAME = re.compile(rb"^((?:# (?:HELP|TYPE|UNIT) )?)" + PREFIX.encode(), re.MULTILINE)
_OPENMETRICS = "application/openmetrics-text"
LATENCIES_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0,
)  # fmt: skip
"""Bounds of buckets for what lasts about a pass, in seconds."""
LONG_LATENCIES_S = (
    0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
"""For what lasts about an answer, in seconds."""
LAG_EVERY_S = 0.25
"""The event loop's lag is tried so often."""
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""For sizes of batches."""

Reading = Callable[[], float | Mapping[str, float] | None]
"""A value at the time of a scrape, one for each value of the label where there is one, or None
where there is nothing to show."""


def exposition(registry: CollectorRegistry, accept: str, prefix: str) -> tuple[bytes, str]:
    """What a scrape gets: text and content type. Names are the same in both formats.

    Args:
        accept: the header, which chooses OpenMetrics 1.0 or Prometheus' text format; one that
            cannot be read chooses the latter.
        prefix: of the names; anything but `PLAIN_PREFIX` is `PREFIX`.
    """
    text: bytes
    if _wants_openmetrics(accept):
        # Without this argument prometheus_client writes `_` for the colon in the names of samples.
        # Every name is valid without escaping, so the type names no escaping either.
        text = openmetrics.generate_latest(  # type: ignore[no-untyped-call]
            registry, escaping=openmetrics.ALLOWUTF8
        )
        content_type = f"{_OPENMETRICS}; version=1.0.0; charset=utf-8"
    else:
        text, content_type = generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
    if prefix == PLAIN_PREFIX:
        text = _NAME.sub(rb"\1" + PLAIN_PREFIX.encode(), text)
    return text, content_type


def _wants_openmetrics(accept: str) -> bool:
    try:
        content_type: str = choose_encoder(accept)[1]
    except (TypeError, ValueError):  # a version that is no number
        return False
    return content_type.startswith(_OPENMETRICS)


def process_registry() -> CollectorRegistry:
    """A registry with the metrics of Python and of the process itself."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


async def measure_loop_lag(observe: Callable[[float], None]) -> None:
    """Give `observe` how many seconds later than due the event loop runs, until cancelled."""
    clock = asyncio.get_running_loop().time
    while True:
        due_s = clock() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        observe(max(0.0, clock() - due_s))


class Histogram:
    """Observations in buckets. One thread observes; any thread may read.

    Args:
        bounds: upper bounds of the buckets, rising; one more takes all above.
    """

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `times` observations of `value`."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    @property
    def sum(self) -> float:
        """Of all observations."""
        return self._sum

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self._counts)

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it), as the exposition format has them."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        total, rising = 0, []
        for name, count in zip(names, list(self._counts), strict=True):
            total += count
            rising.append((name, float(total)))
        return rising


class _Read:
    """A counter or gauge, and how to read it."""

    def __init__(self, family: type[Metric], name: str, text: str, read: Reading, label: str):
        self._family, self._name, self._text = family, PREFIX + name, text
        self._read, self._label = read, label

    def collect(self) -> Iterator[Metric]:
        values = self._read()
        if values is None:
            return
        labels = [self._label] if self._label else []
        metric = self._family(self._name, self._text, labels=labels)  # type: ignore[call-arg]
        if isinstance(values, Mapping):
            for label, value in dict(values).items():
                metric.add_metric([label], value)  # type: ignore[attr-defined]
        else:
            metric.add_metric([], values)  # type: ignore[attr-defined]
        yield metric

    @property
    def names(self) -> tuple[str, ...]:
        """Of its samples."""
        return (self._name + ("_total" if self._family is CounterMetricFamily else ""),)


class _Observed:
    """A histogram under its name."""

    def __init__(self, name: str, text: str, histogram: Histogram) -> None:
        self._name, self._text, self._histogram = PREFIX + name, text, histogram

    def collect(self) -> Iterator[Metric]:
        metric = HistogramMetricFamily(self._name, self._text)
        metric.add_metric([], self._histogram.buckets(), self._histogram.sum)
        yield metric

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self._name}_{part}" for part in ("bucket", "sum", "count"))


class Metrics(Collector):
    """All metrics of a process, those of Python and of the process itself included.

    Attributes:
        registry: what a scrape renders.
    """

    def __init__(self) -> None:
        self.registry = process_registry()
        self._known: dict[str, _Read | _Observed] = {}
        self.registry.register(self)

    def counter(self, name: str, text: str, read: Reading, label: str = "") -> None:
        """A number that only rises.

        Args:
            name: without prefix and without `_total`.
            text: what is counted, in which unit.
            read: called from the scrape's thread.
            label: the label's name where `read` gives a mapping.
        """
        self._add(name, _Read(CounterMetricFamily, name, text, read, label))

    def gauge(self, name: str, text: str, read: Reading, label: str = "") -> None:
        """A number that rises and falls; arguments as of `counter`."""
        self._add(name, _Read(GaugeMetricFamily, name, text, read, label))

    def histogram(self, name: str, text: str, bounds: Iterable[float] = LATENCIES_S) -> Histogram:
        """A histogram, which the caller observes."""
        histogram = Histogram(bounds)
        self._add(name, _Observed(name, text, histogram))
        return histogram

    def _add(self, name: str, metric: _Read | _Observed) -> None:
        if name in self._known:
            raise ValueError(f"metric {name!r} exists")
        self._known[name] = metric

    @property
    def names(self) -> frozenset[str]:
        """Names of all samples of ours, with suffixes."""
        return frozenset(name for metric in self._known.values() for name in metric.names)

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not read values to know names, which are unique here."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read everything."""
        for metric in list(self._known.values()):
            yield from metric.collect()


def register_shared(metrics: Metrics, counters: Counter[str], traffic: Traffic) -> None:
    """What the sockets of every role count anyway.

    Args:
        counters: those of the registry's record, by the name of the event.
    """
    metrics.counter("bytes_sent", "Bytes of frames sent to other workers.", lambda: traffic.sent)
    metrics.counter(
        "bytes_received", "Bytes of frames received from other workers.", lambda: traffic.received
    )
    metrics.counter(
        "events", "What the worker has survived, as `e2sci status` shows it.",
        lambda: dict(counters), "event",
    )  # fmt: skip
