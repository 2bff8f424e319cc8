"""`bench/evaluation`: the plan, what is kept, the summary and the report."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench.energy import Power, PowerModel
from bench.evaluation.answers import TimedAnswer
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
from bench.evaluation.rows import AnswerRow
from bench.evaluation.summary import Line, as_markdown, as_table, duels, summarise
from bench.lines import append_rows, read_all
from bench.paced import THIS_DEVICE, Device
from bench.ranges import Interval
from bench.turns import in_turn
from bus.protocol.errors import ConfigurationError
from tests.bench.evaluation_rows import (
    USAGE,
    row,
)

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


def test_each_overlay_is_compared_with_its_host() -> None:
    rows = [
        row(method, 0, decode_seconds=seconds)
        for method, seconds in (("fsd:0.1", 4.0), ("e2sci+fsd:0.1", 2.0), ("e2sci+amusd:0.1", 1.0))
    ]
    (duel,) = duels(rows)
    assert (duel.method, duel.other) == ("e2sci+fsd:0.1", "fsd:0.1")
    assert duel.ratio.value == pytest.approx(2.0)


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
