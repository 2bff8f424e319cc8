"""The predictor learns the table, and its file keeps everything."""

from __future__ import annotations

import msgspec
import pytest

from bus.protocol.errors import ConfigurationError
from controller.calibration import About, Calibration, load_calibration
from decoding.credit import CreditLaw
from tests.training.test_table import record
from training.calibration.predictor import train
from training.calibration.table import LEAST_WINDOWS, Table, make_table, safe_thresholds

LAW = CreditLaw(neutral=lambda _: 0.6)


@pytest.fixture(scope="module")
def table_and_layers() -> tuple[Table, Calibration]:
    """Low credit keeps quality up to 0.05 only, high credit up to 0.3."""
    records = [
        record(
            credit=credit + 0.005 * i, threshold=threshold, num_committed=committed,
            regret=3 * loss,
        )
        for credit, losses in ((0.3, (0.0, 0.02, 0.3)), (0.85, (0.0, 0.0, 0.02)))
        for threshold, committed, loss in zip((-1.0, 0.05, 0.3), (2, 3, 4), losses, strict=True)
        for i in range(LEAST_WINDOWS)
    ]  # fmt: skip
    table = make_table(records, num_bins=2)
    ticks: list[None] = []
    layers = train(table, records, LAW, lambda: ticks.append(None))
    assert len(ticks) == 900
    about = About(
        "target", "draft", "digest", "data.jsonl", "40ms", "2026-11-25", len(records),
        table.neutral, table.edges, safe_thresholds(table), table.to_json(),
    )  # fmt: skip
    return table, Calibration(about, layers)


@pytest.mark.long
def test_the_law_then_relaxes_where_quality_allows_and_not_elsewhere(
    table_and_layers: tuple[Table, Calibration],
) -> None:
    _, calibration = table_and_layers
    law = calibration.law(LAW)

    def asked(credit: float) -> float:
        return law.threshold(credit - 0.6, credit, law.predictor(credit, 0.0).omega)

    assert asked(0.88) > 0.25
    assert asked(0.32) < 0.08


@pytest.mark.long
def test_safe_thresholds_lie_where_the_loss_reaches_the_limit(
    table_and_layers: tuple[Table, Calibration],
) -> None:
    """From 0.02 at 0.05 to 0.3 at 0.3: 0.05 is reached at 0.05 + 0.25·(0.03/0.28) = 0.0768."""
    table, _ = table_and_layers
    low, high = safe_thresholds(table)
    assert low == pytest.approx(0.0768, abs=0.002)
    assert high == pytest.approx(0.3)


def test_a_file_keeps_everything(
    tmp_path_factory: pytest.TempPathFactory, table_and_layers: tuple[Table, Calibration]
) -> None:
    _, calibration = table_and_layers
    path = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    calibration.save(path)
    again = load_calibration(path)
    assert again.about == calibration.about
    for credit in (0.2, 0.6, 0.9):
        ours, theirs = (c.law(LAW).predictor(credit, 0.1) for c in (calibration, again))
        assert theirs.omega == pytest.approx(ours.omega, rel=1e-4)
        assert theirs.window == ours.window
    path.write_bytes(b"x")
    with pytest.raises(ConfigurationError, match="is no calibration"):
        load_calibration(path)
    with pytest.raises(ConfigurationError, match="is no calibration"):
        load_calibration(path.with_name("none"))
    old = msgspec.structs.replace(calibration.about, format="e2sci-calibration-0")
    Calibration(old, calibration.layers).save(path)
    with pytest.raises(ConfigurationError, match="calibrate again"):
        load_calibration(path)


def test_a_mismatch_is_named(table_and_layers: tuple[Table, Calibration]) -> None:
    _, calibration = table_and_layers
    assert calibration.mismatch("target", "draft", "digest") is None
    assert calibration.mismatch("other", "draft", "digest") == (
        "it was made for the target target, here is other"
    )
    assert "tokenizer" in (calibration.mismatch("target", "draft", "x") or "")


def test_no_threshold_is_beyond_what_is_safe(
    table_and_layers: tuple[Table, Calibration],
) -> None:
    law = table_and_layers[1].law(LAW)
    assert law.threshold(-0.3, 0.32, omega=0.05) == law.safe(0.32) < 0.08  # asks for 0.135
