"""Records and the table made of them: by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from bus.protocol.errors import ConfigurationError
from decoding.credit import interpolated_neutral, neutral_acceptance
from training.calibration.curves import Curve, gains_of_following
from training.calibration.records import (
    WindowRecord,
    on_another_link,
    read_records,
    write_records,
)
from training.calibration.table import (
    LEAST_WINDOWS,
    Price,
    differences,
    make_table,
    mean_token_ms,
    safe_thresholds,
)


def record(**changes: Any) -> WindowRecord:
    values: dict[str, Any] = {
        "sample": 0, "index": 0, "credit": 0.6, "credit_delta": 0.0, "threshold": -1.0,
        "num_drafted": 4, "num_accepted": 2, "num_committed": 3, "expected_accepted": 2.4,
        "draft_ms": 40.0, "verify_ms": 100.0, "queue_ms": 1.0, "rtt_ms": 9.0, "num_scored": 3,
        "log_likelihood": -0.6, "num_greedy": 3, "regret": 0.0,
    }  # fmt: skip
    return WindowRecord(**(values | changes))


def test_records_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    records = [record(), record(energy_j=2.5, sample=1)]
    write_records(path, records)
    assert read_records(path) == records
    with pytest.raises(ConfigurationError, match="no records of a calibration"):
        read_records(tmp_path / "none.parquet")
    (tmp_path / "other").write_text("x")
    with pytest.raises(ConfigurationError, match="no records of a calibration"):
        read_records(tmp_path / "other")


def test_a_record_knows_its_segment_and_acceptance() -> None:
    assert record().segment_ms == 150.0
    assert record().acceptance == pytest.approx(0.6)
    assert mean_token_ms([record(), record(num_committed=2)]) == 300.0 / 5


def test_another_link_changes_the_round_trip_alone() -> None:
    (moved,) = on_another_link([record(rtt_ms=42.0)], measured_rtt_ms=40.0, rtt_ms=160.0)
    assert moved == record(rtt_ms=162.0)


def windows(threshold: float, loss: float, committed: int, credit: float) -> list[WindowRecord]:
    """Enough windows to count; each loses `loss` nats a token against the first choice."""
    return [
        record(
            threshold=threshold, credit=credit + 0.001 * i, num_committed=committed,
            log_likelihood=-0.6 - 3 * loss, regret=3 * loss,
        )
        for i in range(LEAST_WINDOWS)
    ]  # fmt: skip


def test_the_label_is_the_cheapest_threshold_that_keeps_quality() -> None:
    """At low credit 0.3 loses too much, so 0.1 it is; at high credit 0.3 is cheapest."""
    low = [*windows(-1.0, 0.0, 2, 0.3), *windows(0.1, 0.04, 3, 0.3), *windows(0.3, 0.2, 4, 0.3)]
    high = [*windows(-1.0, 0.0, 2, 0.9), *windows(0.1, 0.0, 3, 0.9), *windows(0.3, 0.02, 4, 0.9)]
    table = make_table(low + high, num_bins=2)
    assert [b.label for b in table.bins] == [0.1, 0.3]
    assert table.bin_of(0.35).label == 0.1
    assert table.bin_of(0.91).label == 0.3
    cell = table.bins[0].cells[1]
    assert (cell.threshold, cell.segment_ms, cell.committed) == (0.1, 150.0, 3.0)
    assert cell.log_likelihood == pytest.approx(-0.24)
    assert cell.regret == pytest.approx(0.04)


@pytest.mark.parametrize(
    "values", [[0.5] * 9, [0.1] * 8 + [0.9], [0.1, 0.2], [0.1 * i for i in range(9)]]
)
def test_no_bin_is_empty(values: list[float]) -> None:
    table = make_table([record(credit=credit) for credit in values])
    assert len(table.bins) == len(table.edges) + 1
    assert all(table.bin_of(credit) in table.bins for credit in values)


def test_cells_with_few_windows_say_nothing() -> None:
    table = make_table([*windows(-1.0, 0.0, 2, 0.5), record(threshold=0.3, num_committed=9)])
    assert {cell.threshold for b in table.bins for cell in b.cells} <= {-1.0}


def test_neutral_credit_is_the_mean_acceptance_by_window() -> None:
    records = [record(num_drafted=2, expected_accepted=1.0)] * 8 + [record()] * 8
    table = make_table(records)
    assert table.neutral == {2: pytest.approx(0.5), 4: pytest.approx(0.6)}
    shape = neutral_acceptance(8) / neutral_acceptance(4)
    assert interpolated_neutral(table.neutral, 8) == pytest.approx(0.6 * shape)
    assert interpolated_neutral({}, 3) == neutral_acceptance(3)


def test_the_window_is_the_one_with_the_greatest_goodput() -> None:
    """A rate of 0.5 with cheap passes wants short windows, 0.95 with a long link long ones."""
    short = [record(num_drafted=1, expected_accepted=0.5, draft_ms=50.0, rtt_ms=0.0)] * 8
    long = [record(num_drafted=1, expected_accepted=0.95, draft_ms=5.0, rtt_ms=200.0)] * 8
    assert make_table(short).bins[0].window <= 2
    assert make_table(long).bins[0].window >= 12


def test_the_spread_is_that_between_samples() -> None:
    """Samples with means 140 and 160 ms: the jackknife's standard error is 10 ms."""
    records = [record(sample=0, rtt_ms=-1.0)] * 4 + [record(sample=1, rtt_ms=19.0)] * 4
    (cell,) = make_table(records, num_bins=1).bins[0].cells
    assert cell.segment_ms == 150.0
    assert list(cell.spread) == pytest.approx([10.0, 0.0, 0.0])


def test_tables_are_compared_in_standard_errors() -> None:
    ours = [record(sample=0, rtt_ms=-1.0)] * 4 + [record(sample=1, rtt_ms=19.0)] * 4
    theirs = [record(sample=0, rtt_ms=29.0)] * 4 + [record(sample=1, rtt_ms=49.0)] * 4
    a, b = (make_table(records, num_bins=1) for records in (ours, theirs))
    speed, apart = differences(a, b)
    assert speed == pytest.approx(150 / 180)
    assert apart == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)
    fewer = make_table([msgspec.structs.replace(r, num_committed=4 - r.sample) for r in theirs],
                       num_bins=1)  # fmt: skip
    _, (_, committed, _) = differences(a, fewer)
    assert committed == pytest.approx(0.5 / 0.5)  # 3 and 3.5 ± 0.5
    with pytest.raises(ValueError, match="too few windows"):
        make_table(ours, edges=(0.9,))


def test_a_price_on_energy_shortens_windows() -> None:
    """Each drafted token costs 1 J and 10 ms; 50 ms a joule make it six times as dear."""
    records = [
        record(num_drafted=w, expected_accepted=w * 0.9, draft_ms=10.0 * w, energy_j=2.0 + w)
        for w in (1, 2, 4, 8) for _ in range(8)
    ]  # fmt: skip
    free, dear = (
        make_table(records, Price(60.0, joule_ms), num_bins=1).bins[0].window
        for joule_ms in (0.0, 50.0)
    )
    assert 1 <= dear < free - 5


def test_regret_is_made_to_fall_with_credit_so_that_what_is_safe_never_does() -> None:
    """0.09 and 0.03 at 0.3 nats, in the wrong order, become their mean."""
    records = [
        *windows(-1.0, 0.0, 2, 0.3), *windows(0.3, 0.03, 3, 0.3),
        *windows(-1.0, 0.0, 2, 0.9), *windows(0.3, 0.09, 3, 0.9),
    ]  # fmt: skip
    table = make_table(records, num_bins=2)
    low, high = table.curves
    assert low.regret == pytest.approx((0.0, 0.06))
    assert high.regret == pytest.approx((0.0, 0.06))
    assert list(safe_thresholds(table)) == pytest.approx([0.25, 0.25])


def test_a_cell_that_commits_less_than_a_stricter_one_is_taken_for_chance() -> None:
    records = [
        *windows(-1.0, 0.0, 3, 0.5),
        *windows(0.1, 0.01, 2, 0.5),
        *windows(0.2, 0.02, 4, 0.5),
    ]
    (b,) = make_table(records, num_bins=1).bins
    (curve,) = make_table(records, num_bins=1).curves
    assert curve.committed == pytest.approx((2.5, 2.5, 4.0))
    assert b.label == 0.2
    assert curve.label(loss_nats=0.015) == -1.0  # 0.1 brings nothing


# --- what following credit can bring ----------------------------------------------------------


def test_credit_brings_nothing_where_bins_are_alike() -> None:
    curve = Curve((-1.0, 0.1, 0.3), (2.0, 3.0, 4.0), (0.0, 0.05, 0.15))
    assert gains_of_following([curve, curve], [1.0, 1.0]) == {-1.0: 1.0, 0.1: 1.0, 0.3: 1.0}


def test_credit_brings_most_where_leniency_pays_in_one_bin_only() -> None:
    """At 0.1 both commit (2 + 3)/2, for a regret of (2·0.1 + 3·0.02)/5 = 0.052 a token. Exact in
    the first and 0.3 in the second give (2 + 4)/2 for 4·0.06/6 = 0.04."""
    hard = Curve((-1.0, 0.1, 0.3), (2.0, 2.0, 3.0), (0.0, 0.1, 0.4))
    easy = Curve((-1.0, 0.1, 0.3), (2.0, 3.0, 4.0), (0.0, 0.02, 0.06))
    gains = gains_of_following([hard, easy], [10.0, 10.0])
    assert gains[-1.0] == 1.0
    assert gains[0.1] == pytest.approx(6 / 5)
    assert gains[0.3] == 1.0


def test_nothing_tried_gives_nothing() -> None:
    assert gains_of_following([Curve()], [0.0]) == {}
    assert Curve().label(1.0) == -1.0
    assert Curve().safe(1.0) == 0.0
