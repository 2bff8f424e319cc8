"""Metrics that are read at the scrape, and histograms."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from bus.runtime.metrics import Histogram, Metrics, exposition

PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.3"
)
"""What they ask for."""


def shown(metrics: Metrics) -> dict[str, float]:
    """Our samples by name and labels, as a scrape has them."""
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {
        sample.name + "".join(f"{{{k}={v}}}" for k, v in sample.labels.items()): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("e2sci:")
    }


def test_values_are_those_at_the_scrape() -> None:
    metrics, counts = Metrics(), {"a": 1}
    metrics.counter("things", "Things.", lambda: counts, "kind")
    metrics.gauge("level", "A level.", lambda: counts["a"] / 2)
    assert shown(metrics) == {"e2sci:things_total{kind=a}": 1, "e2sci:level": 0.5}
    counts.update(a=3, b=2)
    assert shown(metrics) == {
        "e2sci:things_total{kind=a}": 3, "e2sci:things_total{kind=b}": 2, "e2sci:level": 1.5,
    }  # fmt: skip


def test_what_has_no_value_is_not_shown() -> None:
    metrics = Metrics()
    metrics.gauge("level", "A level.", lambda: None)
    assert shown(metrics) == {}


def test_a_histogram_counts_up_to_and_including_each_bound() -> None:
    metrics = Metrics()
    histogram = metrics.histogram("wait_seconds", "Waits.", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.5):
        histogram.observe(value)
    histogram.observe(0.25, times=2)
    assert shown(metrics) == {
        "e2sci:wait_seconds_bucket{le=1.0}": 4, "e2sci:wait_seconds_bucket{le=2.0}": 5,
        "e2sci:wait_seconds_bucket{le=+Inf}": 6, "e2sci:wait_seconds_count": 6,
        "e2sci:wait_seconds_sum": 6.0,
    }  # fmt: skip
    assert (histogram.count, histogram.sum) == (6, 6.0)


def test_names_are_those_of_the_samples() -> None:
    metrics = Metrics()
    metrics.counter("things", "Things.", lambda: 1)
    metrics.gauge("level", "A level.", lambda: 1)
    metrics.histogram("wait_seconds", "Waits.")
    assert {name.partition("{")[0] for name in shown(metrics)} == metrics.names


def test_a_name_is_used_once() -> None:
    metrics = Metrics()
    metrics.gauge("level", "A level.", lambda: 1)
    with pytest.raises(ValueError, match="level"):
        metrics.counter("level", "Another.", lambda: 1)


def test_the_process_itself_is_shown() -> None:
    text = generate_latest(Metrics().registry).decode()
    assert "process_resident_memory_bytes" in text
    assert "python_info" in text


def test_a_histogram_by_itself_is_empty() -> None:
    assert Histogram((1.0,)).buckets() == [("1.0", 0.0), ("+Inf", 0.0)]


@pytest.mark.parametrize("accept", [PROMETHEUS_2, PROMETHEUS_3, "application/openmetrics-text"])
@pytest.mark.parametrize("prefix", ["e2sci:", "e2sci_"])
def test_openmetrics_has_the_names_of_the_text_format(accept: str, prefix: str) -> None:
    metrics = Metrics()
    metrics.counter("done", "Ended.", lambda: 3)
    metrics.counter("by", "By kind.", lambda: {"a": 2}, label="kind")
    metrics.histogram("wait_seconds", "Waiting.", (1.0,))
    text, content_type = exposition(metrics.registry, accept, prefix)
    plain, plain_type = exposition(metrics.registry, "", prefix)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert plain_type.startswith("text/plain; version=0.0.4")
    families = openmetrics.text_string_to_metric_families(  # type: ignore[no-untyped-call]
        text.decode()
    )
    found = {sample.name for family in families for sample in family.samples}
    assert f"{prefix}done_total" in found
    assert found == {
        sample.name
        for family in text_string_to_metric_families(plain.decode())
        for sample in family.samples
    }


def test_without_openmetrics_the_text_format_is_chosen() -> None:
    accept = "text/plain;version=1.0.0,*/*;q=0.1"
    text, content_type = exposition(Metrics().registry, accept, "e2sci:")
    assert content_type.startswith("text/plain; version=0.0.4")
    assert b"# EOF" not in text


@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
def test_an_accept_header_that_cannot_be_read_gets_plain_text(kind: str) -> None:
    metrics = Metrics()
    metrics.gauge("load", "Load.", lambda: 1)
    text, content_type = exposition(metrics.registry, f"{kind};version=zz;q=xx", "")
    assert b"e2sci:load 1.0" in text
    assert content_type.startswith("text/plain; version=0.0.4")
