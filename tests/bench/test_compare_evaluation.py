"""A run of `e2sci bench` beside its prediction: whose answers, which device."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from bench.contention import CONTENTION, Contention, Timing
from bench.evaluation.rows import AnswerRow
from bench.lines import append_rows
from bench.paced import AS_IT_IS
from bench.simulate.compare import draft_agreement
from bench.simulate.compare_evaluation import compare_evaluation, device_of, is_evaluation
from bench.simulate.predict import alone, named, predict
from bus.protocol.errors import ConfigurationError
from engines.chat import encode_prompt
from engines.torch.oracle import RecordedAnswer
from engines.torch.target import TargetModel
from tests.engines.tiny import save_tiny

FOUND = Contention(
    target="t", draft="d", dtype="int8", step=Timing(10.0, 12.0), repeats=3,
    passes={1: Timing(100.0, 130.0), 4: Timing(106.0, 140.0), 8: Timing(200.0, 230.0)},
)  # fmt: skip
ANSWER = tuple(range(20, 60))


def row(method: str, device: str, tokens_per_s: float) -> AnswerRow:
    return AnswerRow(
        method=method, ran=method, dataset="set", prompt_id=0, rtt_ms=40.0, draft="model",
        variant="", clients=1, tokens=len(ANSWER), seconds=9.0, batch_seconds=9.0,
        decode_tokens=len(ANSWER) - 1, decode_seconds=(len(ANSWER) - 1) / tokens_per_s,
        tokens_per_s=tokens_per_s, first_token_ms=1.0, gap_p50_ms=1.0, gap_p95_ms=1.0, usage=None,
        right=None, nats_per_token=0.0, agreement=1.0, regret=0.0, energy_j=1.0,
        energy_source="modelled", text="", token_ids=ANSWER, device=device,
    )  # fmt: skip


def test_passes_take_what_was_measured_at_their_length() -> None:
    padded, usual = device_of(FOUND, padded=True), device_of(FOUND, padded=False)
    assert [padded.target_ms(n) for n in (1, 4, 6, 8)] == [130.0, 140.0, 185.0, 230.0]
    assert (padded.step_ms, padded.step_slowdown) == (12.0, 1.0)
    assert usual.target_ms(4) == 106.0
    assert (usual.step_slowdown, usual.pass_slowdown) == pytest.approx((1.2, 1.3))


def test_a_run_that_went_as_simulated_is_predicted(tmp_path: Path) -> None:
    spec, out = str(save_tiny(tmp_path / "draft")), tmp_path / "run"
    data = tmp_path / "set.jsonl"
    data.write_text(json.dumps({"prompt": "the cat"}) + "\n")
    out.mkdir()
    (out / CONTENTION).write_bytes(msgspec.json.encode(FOUND))
    (out / "plan.json").write_text(json.dumps({"files": [str(data)], "draft": spec}))
    tokenizer = TargetModel.load(spec, "float32", "cpu").tokenizer
    prompt = encode_prompt(tokenizer, "the cat", raw=False)
    hits = draft_agreement(spec, [RecordedAnswer(prompt, ANSWER)])
    device = device_of(FOUND, padded=True)
    speeds = {
        "target": alone(hits, 40.0, device),
        "edge-target": alone(hits, 0.0, device),
        "colocated:3": predict(named("sd:3"), hits, 0.0, device),
        "sd:3": predict(named("sd:3"), hits, 40.0, device),
    }
    rows = [row(name, "padded to: 1", found.tokens_per_s) for name, found in speeds.items()]
    append_rows(out / "rows.jsonl", [*rows, row("target", AS_IT_IS, 1.0)])
    assert is_evaluation(out)
    found = compare_evaluation(out)
    assert [(c.draft, c.method) for c in found] == [
        *(("padded", name) for name in speeds), ("as it is", "target"),
    ]  # fmt: skip
    assert [c.ratio for c in found[:-1]] == pytest.approx([1.0] * len(speeds))
    assert found[-1].measured == pytest.approx(1.0)


def test_a_run_without_the_targets_own_answers_is_an_error(tmp_path: Path) -> None:
    append_rows(tmp_path / "rows.jsonl", [row("auto", AS_IT_IS, 1.0)])
    with pytest.raises(ConfigurationError, match="no answers of the method `target`"):
        compare_evaluation(tmp_path)
