"""`bench/evaluation`: the plan, what is kept, the summary and the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bench.claims import claim
from bench.contention import CONTENTION, Contention, Timing, find_devices, read_contention
from bench.energy import Power, PowerModel
from bench.evaluation.answers import TimedAnswer
from bench.evaluation.inertia import inertia
from bench.evaluation.paddings import padding_tables
from bench.evaluation.plan import (
    BASELINES,
    SWEEP_QUESTIONS,
    Plan,
    Setting,
    check_baselines,
    colocated_window,
    is_baseline,
    needs_sweep,
)
from bench.evaluation.report import by_dataset, write_report
from bench.evaluation.rows import AnswerRow, Key, PaddingRow, WindowRow
from bench.evaluation.run import MAY_GROW, report
from bench.evaluation.summary import Line, as_markdown, as_table, duels, summarise
from bench.lines import append_rows, read_all
from bench.paced import THIS_DEVICE, Device
from bench.ranges import Interval
from bench.turns import in_turn
from bus.protocol.errors import ConfigurationError
from bus.store import Usage, WindowEntry
from engines.padding import Tally

USAGE = Usage(
    drafted_tokens=40, accepted_tokens=30, wasted_tokens=10, rollbacks=4, prehit_rejections=1,
    bytes_up=4000, bytes_down=800, edge_idle=0.25, cloud_idle=0.5,
)  # fmt: skip


def row(method: str, prompt_id: int = 0, **changes: Any) -> AnswerRow:
    values: dict[str, Any] = {
        "method": method, "ran": method, "dataset": "gsm8k", "prompt_id": prompt_id,
        "rtt_ms": 40.0, "draft": "model", "variant": "", "clients": 1, "tokens": 40,
        "seconds": 4.0, "batch_seconds": 4.0 + prompt_id / 1e3, "decode_tokens": 30,
        "decode_seconds": 3.0, "tokens_per_s": 10.0, "first_token_ms": 500.0, "gap_p50_ms": 80.0,
        "gap_p95_ms": 200.0, "usage": None if method == "target" else USAGE, "right": None,
        "nats_per_token": -0.5, "agreement": 1.0, "regret": 0.0, "energy_j": 8.0,
        "energy_source": "modelled", "text": "…", "token_ids": (1, 2), "device": "as it is",
    }  # fmt: skip
    return AnswerRow(**(values | changes))


# --- plan -------------------------------------------------------------------------------------


def write_set(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": f"{path.stem} {i}"}) + "\n" for i in range(count))
    )
    return path


def test_prompts_are_in_turns_and_sweeps_use_others(tmp_path: Path) -> None:
    files = (write_set(tmp_path / "a.jsonl", 20), write_set(tmp_path / "b.jsonl", 20))
    measured, others = Plan(files=files, limit=3, skip=2).questions()
    assert [q.prompt for q in measured] == ["a 2", "b 2", "a 3", "b 3", "a 4", "b 4"]
    assert len(others) == SWEEP_QUESTIONS
    assert not {q.prompt for q in others} & {q.prompt for q in measured}


def test_too_few_rows_are_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="a has 4 rows; 5 are needed"):
        Plan(files=(write_set(tmp_path / "a.jsonl", 4),), limit=3, skip=2).questions()


def test_without_files_our_own_prompts_are_asked() -> None:
    measured, others = Plan(files=(), limit=2).questions()
    assert len(measured) == 2 * len({q.dataset for q in measured}) > 4
    assert others


def test_windows_that_nobody_sets_are_swept() -> None:
    names = (
        "sd", "sd:4", "fsd", "fsd:0.1", "fsd:0.1:6", "plc", "e2sci", "e2sci-no-plc", *BASELINES,
        "colocated:4",
    )  # fmt: skip
    assert [name for name in names if needs_sweep(name)] == ["sd", "fsd", "fsd:0.1", "colocated"]


def test_baselines_are_known_by_name_and_window() -> None:
    names = ("target", "edge-target", "colocated", "colocated:1", "colocated:32", "sd", "target:2")
    assert [name for name in names if is_baseline(name)] == list(names[:5])
    assert [colocated_window(f"colocated:{w}") for w in ("4", "0", "999", "x", "")] == (
        [4, None, None, None, None]
    )


def test_oracle_drafts_are_refused_for_colocated_sd() -> None:
    check_baselines(Plan(files=(), methods=("colocated",)))
    check_baselines(Plan(files=(), methods=("target",), drafts=("oracle:0.1",)))
    with pytest.raises(ConfigurationError, match="colocated has no oracle drafts"):
        check_baselines(Plan(files=(), methods=("colocated:4",), drafts=("model", "oracle:0.1")))


def test_settings_are_all_combinations() -> None:
    plan = Plan(
        files=(), rtts_ms=(0.0, 40.0), drafts=("model", "oracle:0.1"),
        variations=(("credit_memory", "1"), ("credit_memory", "5")),
    )  # fmt: skip
    settings = plan.settings([THIS_DEVICE])
    assert len(settings) == 8
    assert settings[0].variant == "credit_memory=1"
    assert [s.error_rate for s in settings[:4]] == [None, None, 0.1, 0.1]
    assert "oracle:0.1" in str(Setting(40.0, "oracle:0.1"))


def test_each_device_is_a_setting_of_its_own() -> None:
    padded = Device("padded to contended times: 9 ms a step", 9.0)
    one, other = Plan(files=()).settings([THIS_DEVICE, padded])
    question = Plan(files=(), limit=1).questions()[0][0]
    assert one.key("plc", question) != other.key("plc", question)
    assert one.where != other.where
    assert str(other).endswith("padded to contended times")


def test_each_method_begins_in_its_turn() -> None:
    assert [in_turn(("a", "b", "c"), n)[0] for n in range(4)] == ["a", "b", "c", "a"]


# --- rows -------------------------------------------------------------------------------------


def test_half_a_line_of_a_run_that_was_killed_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row("plc")])
    path.write_bytes(path.read_bytes() + msgspec.json.encode(row("sd"))[:50])
    assert [r.method for r in read_all(path, AnswerRow)] == ["plc"]
    append_rows(path, [row("e2sci"), row("fsd")])  # not behind the half line, but below it
    assert [r.method for r in read_all(path, AnswerRow)] == ["plc", "e2sci", "fsd"]
    assert read_all(tmp_path / "none.jsonl", AnswerRow) == []


def test_gaps_are_between_pieces() -> None:
    answer = TimedAnswer("", (1, 2, 3, 4), None, (0.5, 0.6, 0.8), 0.8, 3, 0.3)
    assert answer.first_token_ms == 500.0
    assert answer.gap_ms(50) == pytest.approx(150.0)
    assert TimedAnswer("", (1,), None, (0.5,), 0.5, 0, 0.0).gap_ms(95) == 0.0


def test_energy_is_idle_watts_always_and_busy_watts_while_a_model_runs() -> None:
    assert Power(5.0, 1.0).joules(seconds=10.0, busy_s=4.0) == 10.0 + 16.0
    model = PowerModel(edge=Power(5.0, 1.0), cloud=Power(10.0, 2.0))
    assert model.alone_j(10.0, on_edge=False) == 10.0 + 100.0  # edge idle, cloud always busy
    assert model.alone_j(10.0, on_edge=True) == 50.0 + 20.0
    together = model.answer_j(10.0, 1.0, 8.0, USAGE)
    assert together == pytest.approx((10 + 4 * (1 + 6)) + (20 + 8 * (1 + 4)))


# --- summary ----------------------------------------------------------------------------------


def summary(*rows: AnswerRow) -> dict[tuple[str, str], Line]:
    return {(line.method, line.dataset): line for line in summarise(rows)}


def test_speeds_are_ratios_of_sums_and_methods_are_compared_on_the_same_prompts() -> None:
    rows = [
        row("target", 0, decode_tokens=30, decode_seconds=3.0),
        row("target", 1, decode_tokens=30, decode_seconds=1.0),
        row("plc", 0, decode_tokens=30, decode_seconds=1.0),
    ]
    lines = summary(*rows)
    assert lines["target", "gsm8k"].speed.value == 15.0
    assert lines["plc", "gsm8k"].over_target == Interval(3.0, 3.0, 3.0)  # prompt 0 alone
    assert lines["plc", "gsm8k"].over_sd is None


def test_e2sci_is_compared_with_every_other_method_on_every_data_set() -> None:
    rows = [
        row(method, prompt, dataset=dataset, decode_seconds=seconds)
        for dataset in ("gsm8k", "mmlu")
        for prompt in range(2)
        for method, seconds in (("sd", 4.0), ("e2sci-no-plc:0.1", 3.0), ("e2sci:0.1", 2.0))
    ]
    found = {(duel.other, duel.dataset): duel.ratio.value for duel in duels(rows)}
    assert set(found) == {
        (other, dataset)
        for other in ("sd", "e2sci-no-plc:0.1")
        for dataset in ("all", "gsm8k", "mmlu")
    }
    assert found["sd", "all"] == pytest.approx(2.0)
    assert found["e2sci-no-plc:0.1", "mmlu"] == pytest.approx(1.5)
    assert duels([row("sd"), row("plc")]) == []


def test_intervals_hold_the_value_and_shrink_with_agreement() -> None:
    rng = np.random.default_rng(0)
    noisy = [row("plc", i, decode_seconds=float(s)) for i, s in enumerate(rng.uniform(1, 5, 30))]
    even = [row("sd", i, decode_seconds=3.0) for i in range(30)]
    lines = summary(*noisy, *even)
    wide, narrow = lines["plc", "gsm8k"].speed, lines["sd", "gsm8k"].speed
    assert wide.low < wide.value < wide.high
    assert narrow == Interval(10.0, 10.0, 10.0)
    over = lines["plc", "gsm8k"].over_sd
    assert over is not None
    assert over.value == pytest.approx(wide.value / 10.0)


def test_quality_and_costs_are_means_over_tokens() -> None:
    rows = [
        row("target", nats_per_token=-0.4),
        row("e2sci", 0, nats_per_token=-0.6, agreement=0.9, regret=0.1, tokens=10, energy_j=1.0),
        row("e2sci", 1, nats_per_token=-0.2, agreement=1.0, tokens=30, energy_j=1.0, right=True),
    ]
    line = summary(*rows)["e2sci", "gsm8k"]
    assert line.nats_per_token == pytest.approx(-0.3)
    assert line.agreement == pytest.approx(0.975)
    assert line.nats_below_target == pytest.approx(0.2)  # prompt 0, the only one both have
    assert line.mj_per_token == pytest.approx(50.0)
    assert line.accuracy == 1.0
    assert line.acceptance == 0.75
    assert line.wasted == pytest.approx(0.25)
    assert line.cloud_busy == 0.5


def test_all_data_sets_come_first_and_only_where_there_are_several() -> None:
    one = summarise([row("plc"), row("sd")])
    assert [line.dataset for line in one] == ["gsm8k", "gsm8k"]
    two = summarise([row("plc"), row("plc", dataset="mmlu")])
    assert [line.dataset for line in two] == ["all", "gsm8k", "mmlu"]
    assert as_table(two).row_count == 1
    assert as_markdown(two).count("\n| plc") == 1


def test_prompts_at_once_share_the_time() -> None:
    together = [row("plc", i, batch_seconds=5.0, clients=2, batch="0") for i in range(2)]
    assert summary(*together)["plc", "gsm8k"].goodput == pytest.approx(80 / 5.0)


def test_batches_that_happen_to_take_the_same_time_are_two() -> None:
    rows = [row("plc", i, batch_seconds=5.0, clients=2, batch=str(i // 2)) for i in range(4)]
    assert summary(*rows)["plc", "gsm8k"].goodput == pytest.approx(160 / 10.0)


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
        epoch=0, seq=number, outcome="accepted", num_drafted=4, num_accepted=accepted,
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
        "e2sci:0.1 against the others",
        "Energy and latency", "Round trips", "Credit inertia", "Windows behind good",
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
