"""`bench/pace`: the order of turns, the climb to the best window, and the summary."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from bench.lines import append_rows
from bench.pace.plan import Plan
from bench.pace.rows import (
    ALONE,
    PaceRow,
    StackRow,
    TimelineRow,
    read_rows,
    read_timeline_rows,
)
from bench.pace.run import run
from bench.pace.stacks import _step_ms
from bench.pace.summary import PaceCell, Spread, as_table, summarise
from bus.protocol.errors import ConfigurationError
from bus.store import DraftSpan, TimelineEntry, Usage

TIMELINE = TimelineEntry(
    at_ms=1, request="r", session="s", client="c", edge="e", cloud="k", method="plc", events=()
)


def usage(edge_idle: float = 0.5, wasted: int = 10, accepted: int = 30) -> Usage:
    return Usage(
        prompt_tokens=5, completion_tokens=32, drafted_tokens=35, accepted_tokens=accepted,
        windows=8, rollbacks=2, acceptance=0.9, seconds=1.0, tokens_per_s=32.0, bytes_up=1,
        bytes_down=1, bytes_per_drafted_token=1.0, lossless=True, wasted_tokens=wasted,
        edge_idle=edge_idle,
    )  # fmt: skip


def row(
    method: str, tokens: int, seconds: float, repeat: int = 0, error: float | None = 0.1
) -> PaceRow:
    used = None if method == ALONE else usage()
    return PaceRow("default", error, 40.0, method, repeat, 0, tokens, seconds, used)


def stack(error: float | None = 0.1) -> StackRow:
    return StackRow("default", error, 40.0, 10.0, 0.1, 0.2, 0.3, True)


def test_oracles_stand_on_the_first_draft_only() -> None:
    plan = Plan(rtts_ms=(0.0, 40.0), error_rates=(None, 0.1), drafts=("a", "b"))
    found = [(s.draft, s.error_rate, s.rtt_ms) for s in plan.settings]
    models = [(d, None, rtt) for d in ("a", "b") for rtt in (0.0, 40.0)]
    assert found == [*models, ("a", 0.1, 0.0), ("a", 0.1, 40.0)]


def test_every_method_begins_equally_often() -> None:
    plan = Plan(methods=("plc", "plc-literal"))
    first = [plan.turns(repeat, prompt, "sd:4")[0] for repeat in range(3) for prompt in range(3)]
    assert sorted(first) == sorted(["sd:4", "plc", "plc-literal"] * 3)
    assert all(sorted(plan.turns(r, 1, "sd:4")) == ["plc", "plc-literal", "sd:4"] for r in range(3))


def test_each_repetition_draws_other_errors_and_each_method_meets_the_same() -> None:
    plan = Plan()
    seeds = {plan.seed(prompt, repeat) for prompt in range(20) for repeat in range(-1, 5)}
    assert len(seeds) == 20 * 6
    assert min(seeds) >= 0


def test_speed_is_tokens_over_seconds_of_a_repetition_and_ratios_are_paired() -> None:
    rows = [
        row("sd:4", 30, 2.0), row("sd:4", 10, 2.0),  # 10 tokens/s
        row("plc", 30, 2.0), row("plc", 30, 1.0),  # 20 tokens/s
        row("sd:4", 40, 2.0, repeat=1), row("plc", 60, 2.0, repeat=1),  # 20 and 30
        row(ALONE, 50, 10.0),
        row("sd:2", 1000, 1.0, repeat=-1),  # the sweep counts for nothing
    ]  # fmt: skip
    cells = {cell.method: cell for cell in summarise(rows, [stack()])}
    assert set(cells) == {"sd:4", "plc"}
    assert cells["plc"].speed == Spread(25.0, 20.0, 30.0)
    assert cells["plc"].over_sd == Spread(1.75, 1.5, 2.0)
    assert cells["sd:4"].over_sd == Spread(1.0, 1.0, 1.0)
    assert cells["plc"].over_alone == 5.0


def test_the_ceiling_is_that_of_a_single_chain() -> None:
    rows = [row("sd:4", 40, 2.0), row("plc", 60, 2.0), row(ALONE, 50, 5.0)]
    plc = {cell.method: cell for cell in summarise(rows, [stack()])}["plc"]
    # N = 10 tokens per 10 · 10 ms + 40 ms + 100 ms
    assert plc.ceiling == pytest.approx(10 / 0.240)
    assert plc.of_ceiling == pytest.approx(30 * 0.024)
    assert plc.wasted == 0.25


def test_a_draft_model_has_no_ceiling_of_its_own() -> None:
    rows = [row("sd:4", 40, 2.0, error=None), row(ALONE, 50, 5.0, error=None)]
    (cell,) = summarise(rows, [stack(None)])
    assert cell.ceiling is cell.of_ceiling is None
    assert as_table([cell]).row_count == 1


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [row("plc", 3, 0.5), row(ALONE, 2, 1.0)]
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    assert read_rows(path) == rows
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"draft": 3}\n')
    with pytest.raises(ConfigurationError, match=r"rows\.jsonl is damaged"):
        read_rows(path)


def test_a_complete_run_is_summarised_without_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(rtts_ms=(40.0,), error_rates=(0.1,))
    run_files(tmp_path, plan)
    cells = run(plan, tmp_path, as_json=True)
    assert [cell.method for cell in cells] == ["sd:4", "plc"]
    assert isinstance(cells[0], PaceCell)
    assert capsys.readouterr().out.count('"source": "measured"') == 2


def test_what_was_cut_off_while_it_was_written_counts_for_nothing(tmp_path: Path) -> None:
    plan = Plan(rtts_ms=(40.0,), error_rates=(0.1,))
    run_files(tmp_path, plan)
    whole = read_rows(tmp_path / "rows.jsonl")
    append_rows(tmp_path / "rows.jsonl", [row("plc", 9, 9.0, error=0.2)])
    late = TimelineRow("default", 0.2, 40.0, TIMELINE)
    append_rows(tmp_path / "timelines.jsonl", [late, replace(late, error_rate=0.1)])
    run(plan, tmp_path, as_json=True)
    assert read_rows(tmp_path / "rows.jsonl") == whole
    assert [t.error_rate for t in read_timeline_rows(tmp_path / "timelines.jsonl")] == [0.1]


def test_another_plan_does_not_fill_the_same_directory(tmp_path: Path) -> None:
    plan = Plan(rtts_ms=(40.0,), error_rates=(0.1,))
    run_files(tmp_path, plan)
    run(plan, tmp_path, as_json=True)
    with pytest.raises(ConfigurationError, match="other settings"):
        run(Plan(rtts_ms=(40.0,), error_rates=(0.1,), repeats=2), tmp_path, as_json=True)
    with pytest.raises(ConfigurationError, match="other settings"):
        run(Plan(rtts_ms=(40.0,), error_rates=(0.1,), dtype="float32"), tmp_path, as_json=True)


def run_files(out: Path, plan: Plan) -> None:
    rows = [row("sd:4", 40, 2.0), row("plc", 60, 2.0), row(ALONE, 50, 5.0)]
    append_rows(out / "rows.jsonl", rows)
    (out / "answers.jsonl").touch()
    append_rows(out / "stacks.jsonl", [stack()])


def test_a_step_is_timed_in_whatever_method_waits_for_its_feedback() -> None:
    spans = (DraftSpan(0.0, 100.0, 3, 2), DraftSpan(100.0, 120.0, 5, 2))
    entries = [
        TimelineEntry(
            at_ms=1, request="r", session="s", client="c", edge="e", cloud="k", method=method,
            events=tuple(replace(span, end_ms=span.end_ms + late_ms) for span in spans),
        )
        for method, late_ms in (("fsd:0.1", 0.0), ("plc", 500.0))
    ]  # fmt: skip
    assert _step_ms(entries) == 10.0
