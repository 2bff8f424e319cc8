"""A measured run beside its prediction: whose tokens, which device."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from bench.lines import append_rows
from bench.pace.plan import Plan
from bench.pace.rows import ALONE, PaceRow, StackRow, TimelineRow
from bench.pace.run import run
from bench.simulate.compare import compare, draft_agreement
from bench.simulate.device import Device
from bench.simulate.pair import SimulatedSession
from bus.protocol.errors import ConfigurationError
from bus.store import TimelineEntry
from decoding import methods
from engines.torch.cache import KVCache
from engines.torch.draft import load_draft
from engines.torch.oracle import RecordedAnswer, is_wrong, write_answers
from tests.bench.test_pace import usage
from tests.engines.tiny import save_tiny

DEVICE = Device(step_ms=10.0, pass_ms=100.0, pass_token_ms=4.0)
PROMPT = (1, 2, 3)
LENGTH = 60


def test_a_draft_agrees_where_its_most_probable_token_is_the_answers(tmp_path: Path) -> None:
    spec = str(save_tiny(tmp_path / "draft"))
    network = load_draft(spec, "float32").network
    text = [5, 17, 99]
    for _ in range(6):
        with torch.inference_mode():
            text.append(int(network.logits(torch.tensor(text), KVCache(), 1).argmax()))
    wrong = (text[5] + 1) % 200
    answer = (text[3], text[4], wrong)
    (found,) = draft_agreement(spec, [RecordedAnswer(tuple(text[:3]), answer)])
    assert found == (True, True, False)


def write_run(out: Path, plan: Plan) -> None:
    """A run of one prompt whose every session took exactly what the simulation says."""
    rows, timelines = [PaceRow("none", None, 0.0, ALONE, 0, 0, 50, 5.0)], []
    for repeat in range(-1, plan.repeats):
        seed = plan.seed(0, repeat)
        agrees = tuple(not is_wrong(seed, len(PROMPT) + i, 0.2) for i in range(LENGTH))
        for name in ("sd:2", "sd:4", "sd:8") if repeat < 0 else ("sd:4", "plc"):
            method = methods.find(name)
            assert method is not None
            outcome = SimulatedSession(method, agrees, 40.0, DEVICE).run()
            tokens = sum(count for _, count in outcome.pieces[1:])
            seconds = (outcome.pieces[-1][0] - outcome.pieces[0][0]) / 1e3
            rows.append(PaceRow("default", 0.2, 40.0, name, repeat, 0, tokens, seconds, usage()))
            entry = TimelineEntry(
                at_ms=0, request="r", session="s", client="c", edge="e", cloud="d", method=name,
                events=outcome.timeline.events(),
            )  # fmt: skip
            timelines.append(TimelineRow("default", 0.2, 40.0, entry))
    out.mkdir()
    append_rows(out / "rows.jsonl", rows)
    append_rows(out / "timelines.jsonl", timelines)
    append_rows(out / "stacks.jsonl", [StackRow("default", 0.2, 40.0, 10.0, 0.1, 0.2, 0.3, True)])
    write_answers(out / "answers.jsonl", [RecordedAnswer(PROMPT, (7,) * LENGTH)])
    run(plan, out, as_json=True)  # complete: it only writes the plan


def test_a_run_that_went_as_simulated_is_predicted(tmp_path: Path) -> None:
    plan = Plan(rtts_ms=(40.0,), error_rates=(0.2,), prompts=1, repeats=4, max_new_tokens=LENGTH)
    write_run(tmp_path / "run", plan)
    device, rows = compare(tmp_path / "run")
    assert device.step_ms == pytest.approx(10.0)
    assert device.pass_ms == pytest.approx(100.0, rel=0.02)
    ratios = {row.method: row.ratio for row in rows}
    assert ratios["sd:4"] == pytest.approx(1.0, abs=0.12)
    assert ratios["plc"] == pytest.approx(1.0, abs=0.12)
    assert msgspec.to_builtins(device)["step_slowdown"] >= 1.0


def test_a_directory_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no run of `e2sci bench pace`"):
        compare(tmp_path)
