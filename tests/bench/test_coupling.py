"""`bench/coupling`: figures of models that always agree and of strangers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.coupling import CouplingFigures, Position, positions, summarise
from bench.reference import generate_alone
from cli.main import app
from decoding.sampling import SamplingParams
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel

PROMPT = (5, 9, 40, 77, 9, 40, 3)
HOW = [SamplingParams(), SamplingParams(0.8, 0.9, seed=3), SamplingParams(1.2, seed=3)]


def measured(
    target: TargetModel, draft: Path, num_sparse: int, sampling: SamplingParams
) -> list[Position]:
    drafter = ModelDrafter.load(str(draft), "float32", "cpu", num_sparse)
    answer = tuple(generate_alone(target, PROMPT, sampling, 40, frozenset()))
    return positions(target, drafter, PROMPT, answer, sampling)


@pytest.mark.parametrize("sampling", HOW, ids=str)
def test_a_draft_that_is_the_target_agrees_with_both_couplings(
    target: TargetModel, folder: Path, sampling: SamplingParams
) -> None:
    found = measured(target, folder / "target", 100_000, sampling)
    assert len(found) == 40
    assert all(position.agrees for position in found)
    assert min(position.overlap for position in found) > 0.99  # probabilities travel as float16


@pytest.mark.parametrize("sampling", HOW[1:], ids=str)
def test_a_stranger_agrees_where_the_distributions_overlap(
    target: TargetModel, folder: Path, sampling: SamplingParams
) -> None:
    found = summarise(measured(target, folder / "stranger", 100_000, sampling), 1, sampling)
    assert 0.0 < found.bound < found.residual < 0.9
    assert found.gumbel > found.bound - 4 * max(found.error, 0.08)


def test_figures_are_means_over_positions() -> None:
    found = [Position(True, 1.0), Position(False, 0.5), Position(True, 0.0), Position(False, 0.5)]
    figures = summarise(found, 2, HOW[1])
    assert figures.bound == pytest.approx((1 + 1 / 3 + 0 + 1 / 3) / 4)
    assert figures == CouplingFigures(
        0.8, 0.9, num_answers=2, num_tokens=4, gumbel=0.5, error=0.25, residual=0.5,
        bound=figures.bound,
    )  # fmt: skip


def test_the_command_gives_a_line_for_each_temperature(folder: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["bench", "coupling", "--target", str(folder / "target"), "--draft",
         str(folder / "target"), "--dtype", "float32", "--prompts", "2", "--max-new-tokens", "6",
         "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["temperature"], row["top_p"]) for row in rows] == [(0, 1), (0.8, 0.9), (1.2, 1)]
    assert rows[0]["gumbel"] == rows[0]["residual"] == rows[0]["bound"] == 1.0
    assert {row["source"] for row in rows} == {"measured"}
