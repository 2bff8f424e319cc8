"""Credit inertia and the page that an evaluation ends with."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench.claims import claim
from bench.contention import CONTENTION, Contention, Timing, find_devices, read_contention
from bench.evaluation.inertia import inertia
from bench.evaluation.paddings import padding_tables
from bench.evaluation.plan import (
    Plan,
)
from bench.evaluation.report import by_dataset, write_report
from bench.evaluation.rows import Key, PaddingRow, WindowRow
from bench.evaluation.run import MAY_GROW, report
from bench.evaluation.summary import summarise
from bench.paced import THIS_DEVICE, Device
from bench.ranges import Interval
from bus.protocol.errors import ConfigurationError
from bus.store import WindowEntry
from engines.padding import Tally
from tests.bench.evaluation_rows import (
    row,
)

# --- credit inertia ---------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.evaluation.inertia.RESAMPLES", 60)


def test_a_chain_that_stays_where_it_is_is_inert_and_noise_is_not() -> None:
    rng = np.random.default_rng(1)
    steady = [[float(level)] * 3 + [float(level) - 0.1] * 3 for level in rng.uniform(0.2, 1, 40)]
    found = inertia(steady)
    assert found.autocorrelation[0].value > 0.9
    noise = [rng.uniform(0, 1, 20).tolist() for _ in range(40)]
    found = inertia(noise)
    assert found.autocorrelation[0].low < 0.0 < found.autocorrelation[0].high
    assert abs(found.shuffled) < 0.15


def test_levels_of_answers_alone_look_like_inertia_and_shuffling_tells() -> None:
    rng = np.random.default_rng(2)
    levels = rng.uniform(0.1, 0.9, 40)
    found = inertia([(level + rng.normal(0, 0.05, 20)).tolist() for level in levels])
    assert found.autocorrelation[0].value == pytest.approx(found.shuffled, abs=0.05)


def test_groups_are_windows_behind_five_good_or_bad_ones() -> None:
    found = inertia([[0.9] * 5 + [0.7], [0.1] * 5 + [0.3], [0.5] * 6])
    assert (found.num_high, found.num_low) == (1, 1)
    assert found.after_high.value == 0.7
    assert found.after_low.value == 0.3
    assert math.isnan(inertia([[0.5] * 6]).after_high.value)


# --- report -----------------------------------------------------------------------------------


def window(number: int, accepted: int) -> WindowEntry:
    return WindowEntry(
        at_ms=number, request="r", session="s", client="c", edge="e", cloud="k", method="sd:2",
        incarnation=1, number=number, outcome="accepted", num_drafted=4, num_accepted=accepted,
        num_committed=accepted, rollback=False, threshold=0.1, window=4, credit=0.5, draft_ms=10.0,
        verify_ms=80.0, queue_ms=0.0, rtt_ms=1.0, bytes_up=1, bytes_down=1,
    )  # fmt: skip


def window_rows() -> list[WindowRow]:
    rng = np.random.default_rng(3)
    return [
        WindowRow(
            key=Key("sd", dataset, index, 40.0, "model", ""),
            windows=tuple(window(i, int(rng.integers(0, 5))) for i in range(12)),
            expected=(),
        )
        for dataset in ("gsm8k", "mmlu")
        for index in range(6)
    ]  # fmt: skip


def test_inertia_is_told_of_lockstep_with_one_window_only() -> None:
    rows = window_rows()
    found = by_dataset(rows)
    assert list(found) == ["gsm8k", "mmlu", "all"]
    assert found["all"].num_windows == 144
    others = [
        msgspec.structs.replace(r, key=msgspec.structs.replace(r.key, method="plc")) for r in rows
    ]
    assert by_dataset(others) == {}


def test_a_report_is_one_page_with_every_part(tmp_path: Path) -> None:
    rows = [
        row(method, prompt, dataset=dataset, rtt_ms=rtt, decode_seconds=3.0 - 0.1 * prompt)
        for method in ("target", "sd", "plc", "e2sci:0.1", "e2sci:0.2")
        for dataset in ("gsm8k", "mmlu")
        for prompt in range(3)
        for rtt in (0.0, 40.0)
    ]
    lines = summarise(rows)
    windows = window_rows()
    page = write_report(tmp_path, rows, windows, lines, by_dataset(windows)).read_text("utf-8")
    for title in (
        "All data sets together", "Speed over the target alone", "Quality and speed",
        "One method against another",
        "Energy and latency", "Round trips", "Credit inertia", "Windows after good",
    ):  # fmt: skip
        assert f"<h2>{title}" in page
    assert "cdn" not in page.split("</script>")[-1]
    assert (tmp_path / "table.md").read_text("utf-8").startswith("| method | RTT, ms |")
    assert "| e2sci:0.1 ÷ plc, 40 ms |" in (tmp_path / "table.md").read_text("utf-8")


def test_a_report_tells_devices_apart_and_shows_whether_padding_held(tmp_path: Path) -> None:
    padded = Device("padded to contended times: 9 ms a step", 9.0)
    rows = [
        row(method, prompt, device=device, dtype="int8", decode_seconds=seconds)
        for method in ("target", "edge-target", "colocated", "sd", "e2sci:0.1")
        for prompt in range(2)
        for device, seconds in (("as it is", 2.0), (padded.name, 3.0))
    ]
    lines = summarise(rows)
    assert {(line.device, line.speed.value) for line in lines} == (
        {("as it is", 15.0), (padded.name, 10.0)}
    )
    assert all(line.over_target == Interval(1.0, 1.0, 1.0) for line in lines)
    (tmp_path / CONTENTION).write_bytes(msgspec.json.encode(CONTENTION_FOUND))
    tables = padding_tables(tmp_path, [padding_row("sd", 2), padding_row("sd", 4)])
    page = write_report(tmp_path, rows, [], lines, {}, tables).read_text("utf-8")
    for text in (
        "<h2>Speed-up, padded to contended times", "<h2>Energy and latency, as it is",
        "<h2>Contended times", "<td>pass over 8 tokens</td><td>20.0</td><td>30.0</td>",
        "<h2>Did the padding hold?", "<td>sd</td><td>3.0%</td><td>0.5%</td><td>–</td>",
        "<dt>Number format</dt><dd>int8</dd>", "co-located SD",
    ):  # fmt: skip
        assert text in page
    markdown = (tmp_path / "table.md").read_text("utf-8")
    assert "| colocated | padded to contended times |" in markdown
    assert "| e2sci:0.1 ÷ sd, as it is |" in markdown
    assert "| sd | 3.0% | 0.5% | – |" in markdown


def padding_row(method: str, long_steps: int) -> PaddingRow:
    return PaddingRow(
        method=method, rtt_ms=40.0, draft="model", variant="", device="padded",
        steps=Tally(100, long_steps, 2.0, 0.01), passes=Tally(),
    )  # fmt: skip


CONTENTION_FOUND = Contention(
    target="a", draft="b", dtype="int8", step=Timing(2.0, 3.0),
    passes={1: Timing(10.0, 15.04), 8: Timing(20.0, 30.0)}, repeats=5,
)  # fmt: skip


def test_a_run_in_another_number_format_does_not_fill_the_same_directory(tmp_path: Path) -> None:
    claim(tmp_path, Plan(files=(), dtype="int8"), MAY_GROW)
    claim(tmp_path, Plan(files=(), dtype="int8", paced=("none", "contended")), MAY_GROW)
    with pytest.raises(ConfigurationError, match="other settings"):
        claim(tmp_path, Plan(files=(), dtype="float32"), MAY_GROW)


def test_contended_times_are_measured_once_for_a_run(tmp_path: Path) -> None:
    """No model of this name could be loaded: it is not measured again."""
    (tmp_path / CONTENTION).write_bytes(msgspec.json.encode(CONTENTION_FOUND))
    usual, fixed, padded = find_devices(
        ("none", "8,60", "contended"), tmp_path, "/nowhere", "/nowhere", "int8"
    )
    assert usual == THIS_DEVICE
    assert (fixed.least_step_ms, str(fixed.least_passes)) == (8.0, "60")
    assert (padded.least_step_ms, str(padded.least_passes)) == (3.0, "1:15,8:30")
    assert padded.name.startswith("padded to contended times: 3 ms a step; passes 15 ms over 1, ")
    (tmp_path / CONTENTION).write_text("{}")
    with pytest.raises(ConfigurationError, match="use a new --out"):
        read_contention(tmp_path)


def test_a_directory_without_rows_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no rows"):
        report(tmp_path, as_json=False)
