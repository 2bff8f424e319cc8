"""`bench/recorded`: answers are written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.recorded import recorded_answers
from engines.torch.target import TargetModel
from tests.engines.tiny import save_tiny

PROMPTS = ("the cat", "a dog")


def test_answers_are_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = str(save_tiny(tmp_path / "tiny")), tmp_path / "answers.jsonl"
    (one,) = recorded_answers(model, PROMPTS[:1], 12, path)
    written = recorded_answers(model, PROMPTS, 12, path)  # goes on after a run that was cut off
    assert written[0] == one
    monkeypatch.delattr(TargetModel, "load")
    assert recorded_answers(model, PROMPTS, 12, path) == written
    assert [len(answer.answer) for answer in written] == [12, 12]


def test_a_loaded_target_answers_as_its_spec(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "tiny"))
    loaded = TargetModel.load(model, "int8")
    assert recorded_answers(loaded, PROMPTS, 12) == recorded_answers(model, PROMPTS, 12)
