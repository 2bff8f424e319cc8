"""The gauge that tells the energy of passes."""

from __future__ import annotations

import pytest
import torch

from engines.energy import MEASURED, MODELLED, PowerGauge, find_gauge


def test_without_a_counter_watts_are_as_set() -> None:
    gauge = PowerGauge(5.0)
    gauge.begin()
    gauge.end(2.0)
    assert gauge.source == MODELLED
    assert gauge.joules(0.1) == pytest.approx(0.5)


def test_a_counter_gives_the_mean_over_passes() -> None:
    joules = iter((100.0, 120.0, 500.0, 540.0))
    gauge = PowerGauge(5.0, lambda: next(joules))
    assert gauge.source == MEASURED
    assert gauge.watts == 5.0  # nothing has been measured yet
    for _ in range(2):
        gauge.begin()
        gauge.end(1.0)
    assert gauge.watts == pytest.approx(30.0)


def test_a_counter_that_wraps_counts_for_nothing() -> None:
    joules = iter((900.0, 10.0))
    gauge = PowerGauge(5.0, lambda: next(joules))
    gauge.begin()
    gauge.end(1.0)
    assert gauge.watts == 0.0


def test_a_machine_without_counters_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("permission denied")

    monkeypatch.setattr("engines.energy._cpu_counter", broken)
    gauge = find_gauge(torch.device("cpu"), 7.0)
    assert (gauge.source, gauge.watts) == (MODELLED, 7.0)
