"""`e2sci train` on a tiny random target: what is learnt is what the engine runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from bench.passes import GREEDY
from bench.reference import generate_alone
from bus.protocol.errors import ConfigurationError
from cli.main import app
from engines.torch.target import TargetModel
from tests.engines.tiny import save_tiny
from tests.training.silent import Silent
from training.distill.answers import Prompt
from training.optimiser import Optimiser
from training.speculators import run
from training.speculators.answers import answered, made_up_prompts
from training.speculators.corpus import CorpusSettings, load_texts
from training.speculators.medusa import Medusa
from training.speculators.quality import baselines, judged, quality
from training.speculators.run import CHECKPOINT, Kind, TrainSettings, train
from training.speculators.texts import Text, labels

KINDS: tuple[Kind, ...] = ("medusa", "eagle3")
DEPTH = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("target"), num_layers=4)


@pytest.fixture(scope="module")
def target(model: Path) -> TargetModel:
    return TargetModel.load(str(model), "int8", "cpu")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"the dog and {n} cats ran\n" for n in range(70)), "utf-8")
    return path


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the trainings."""
    return tmp_path_factory.mktemp("answers")


@pytest.fixture
def settings(tmp_path: Path, prompts: Path, answers: Path) -> TrainSettings:
    corpus = CorpusSettings(answers, (prompts,), num_tokens=600, max_new_tokens=20)
    return TrainSettings(
        "medusa", tmp_path / "speculator", corpus, depth=DEPTH, head_size=150, steps=30,
        batch_tokens=100,
    )  # fmt: skip


# --- answers ----------------------------------------------------------------------------------


def test_answers_of_a_batch_are_those_of_the_target_alone(target: TargetModel) -> None:
    asked = [Prompt(tuple(range(3, 3 + n)), "some") for n in (2, 9, 5, 30, 2)]
    found = {tuple(r.prompt.tolist()): r for r in answered(target, asked, 12, num_sessions=3)}
    for prompt in asked:
        alone = tuple(generate_alone(target, prompt.tokens, GREEDY, 12, target.eos_tokens))
        assert tuple(found[prompt.tokens].answer.tolist()) == alone


def test_a_target_makes_up_the_same_prompts_for_a_seed(target: TargetModel) -> None:
    first = made_up_prompts(target, 6, seed=3)
    assert first == made_up_prompts(target, 6, seed=3)
    assert first != made_up_prompts(target, 6, seed=300)
    assert all(len(prompt.tokens) > 1 for prompt in first)


# --- what is foreseen -------------------------------------------------------------------------


def test_labels_are_the_tokens_that_follow() -> None:
    assert labels(torch.tensor([5, 6, 7]), 2).tolist() == [[5, 6], [6, 7], [7, -1]]


def text(answer: Sequence[int], features: torch.Tensor) -> Text:
    return Text(torch.tensor([1, 2, *answer]), 2, features)


def test_a_head_that_has_learnt_nothing_gives_the_targets_next_token() -> None:
    """State j is one whose product with the head is greatest at answer[j]."""
    answer = [3, 1, 0, 2]
    states = torch.eye(4)[answer].half()
    module = Medusa(2, torch.eye(4), torch.arange(4), 4)
    assert module.right(text(answer, states)).tolist() == [[True, False]] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_before_the_token_to_foresee(
    kind: Kind, settings: TrainSettings, target: TargetModel
) -> None:
    """The state before the one that foresees a token gives the token before it."""
    settings = replace(settings, kind=kind, steps=1)
    train(settings, target, Silent())
    learnt, _ = load_texts(settings.corpus.directory, kind)
    for one in learnt[:4]:
        if kind == "eagle3":
            assert len(one.features) == len(one.tokens) - 2
            continue
        rows = target.causal.head_rows(torch.arange(target.vocab_size))
        chosen = (one.features.float() @ rows.T).argmax(dim=1)
        agree = chosen[1:] == one.answer[:-1]
        assert agree.float().mean() > 0.9  # float16 may turn a tie


def test_the_mean_counts_whole_chains_alone() -> None:
    right = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
    found = judged([right], [text([4, 4, 4, 4], torch.zeros(4, 1))], 2)
    assert found.positions == 3
    assert found.accepted == pytest.approx((2 + 1 + 0) / 3)
    assert found.right == pytest.approx((2 / 3, 2 / 3))


def test_baselines_count_what_was_learnt_from() -> None:
    learnt = [text([5, 6, 5, 6, 5, 6, 6], torch.zeros(7, 1))]
    held_out = [text([6, 5, 6, 6], torch.zeros(4, 1))]
    found = baselines(learnt, held_out, 8, 2)
    # chains of two after 2, 6 and 5
    assert found["unigram"].accepted == pytest.approx((1 + 0 + 2) / 3)  # 6 6
    assert found["repeat"].accepted == pytest.approx((0 + 0 + 0) / 3)
    assert found["bigram"].accepted == pytest.approx((0 + 2 + 1) / 3)  # 2→5→6, 6→5→6, 5→6→5


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_learns_and_the_engine_foresees_the_same(
    kind: Kind, settings: TrainSettings, target: TargetModel, model: Path
) -> None:
    """What a module foresees of the texts it learnt, the prefix given, is what the engine proposes
    as a chain; int8 may turn a few near-ties. A random target's held-out answers cannot be
    foreseen."""
    steps, learning_rate = (500, 0.1) if kind == "medusa" else (250, 0.01)
    settings = replace(settings, kind=kind, steps=steps, learning_rate=learning_rate)
    report = train(settings, target, Silent())
    assert report.curve[-1].loss < report.curve[0].loss - 0.5
    _, module = run._module(settings, target)
    run._restored(settings, Optimiser(dict(module.named_parameters()), 1.0, 0.1))
    learnt = load_texts(settings.corpus.directory, kind)[0][:8]
    expected = quality(module, learnt).accepted
    assert expected > (0.2 if kind == "medusa" else 1.0)
    speculating = TargetModel.load(str(model), "int8", "cpu")
    speculating.equip([settings.out])
    speculating.speculator(kind).branches = 1
    found = [count for one in learnt for count in chains(speculating, kind, one)]
    assert sum(found) / len(found) == pytest.approx(expected, abs=0.1)


def chains(target: TargetModel, kind: str, one: Text) -> list[int]:
    """Tokens of a chain of DEPTH that equal the answer, at every position with as many after it."""
    tokens, counts = one.tokens.tolist(), []
    for position in range(one.num_prompt, len(tokens) - DEPTH + 1):
        cache = target.open(GREEDY, kind)
        target.prefill(cache, tokens[: position - 1])
        tree = target.propose(cache, tokens[position - 1 : position], DEPTH)
        assert tree.parents == tuple(range(-1, len(tree.tokens) - 1))
        equal = [a == b for a, b in zip(tree.tokens, tokens[position:], strict=False)]
        counts.append((*equal, False).index(False))
        target.close(cache)
    return counts


def command(settings: TrainSettings, model: Path, *more: str) -> list[str]:
    corpus = settings.corpus
    return [
        "train", settings.kind, "--target", str(model), "--dtype", "int8",
        "--out", str(settings.out), "--answers", str(corpus.directory),
        "--prompts", str(corpus.prompts[0]), "--tokens", str(corpus.num_tokens),
        "--max-new-tokens", str(corpus.max_new_tokens), "--head-size", str(settings.head_size),
        "--steps", str(settings.steps), "--batch-tokens", str(settings.batch_tokens),
        "--learning-rate", str(settings.learning_rate), "--threads", "1", *more,
    ]  # fmt: skip


def step_kept(checkpoint: Path) -> int:
    try:
        with safe_open(checkpoint, "pt") as file:
            return int(json.loads(file.metadata()["position"])["step"])
    except (OSError, SafetensorError):
        return 0


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_loses_no_kept_step_and_ends_with_the_same_weights(
    kind: Kind, settings: TrainSettings, target: TargetModel, model: Path, tmp_path: Path
) -> None:
    depth = ("--heads" if kind == "medusa" else "--unroll", str(DEPTH))
    settings = replace(settings, kind=kind, steps=60)
    whole = replace(settings, out=tmp_path / "whole")
    torch.set_num_threads(1)  # as the command's
    train(whole, target, Silent())
    running = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *command(settings, model, *depth)],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoint = settings.out / "work" / CHECKPOINT
    try:
        while step_kept(checkpoint) < 5:
            assert running.poll() is None
            time.sleep(0.01)
    finally:
        running.kill()
        assert running.wait() == -signal.SIGKILL
    kept = step_kept(checkpoint)
    assert 5 <= kept < 60
    shown: list[float] = []

    class Watching(Silent):
        def advance(self, share: float, tokens: int, loss: float | None = None) -> None:
            if loss is not None:
                shown.append(share)

    report = train(settings, target, Watching())
    assert shown[0] == pytest.approx((kept + 1) / 60), "it goes on with the next step"
    assert report.steps == 60
    ours, others = (load_file(out / "speculator.safetensors") for out in (settings.out, whole.out))
    assert all(torch.equal(ours[name], others[name]) for name in others)


def test_the_command_prints_its_report(settings: TrainSettings, model: Path) -> None:
    done = CliRunner().invoke(app, command(replace(settings, steps=3), model, "--json"))
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["kind"], report["steps"]) == ("medusa", 3)
    assert report["others"].keys() == {"unigram", "repeat", "bigram"}
    written: dict[str, Any] = msgspec.json.decode((settings.out / "report.json").read_bytes())
    assert written["final"] == report["final"]
    card = (settings.out / "README.md").read_text("utf-8")
    assert f"{report['final']['accepted']:.2f}" in card


def test_a_run_with_other_settings_is_refused(
    settings: TrainSettings, target: TargetModel, tmp_path: Path
) -> None:
    settings = replace(settings, steps=2)
    train(settings, target, Silent())
    with pytest.raises(ConfigurationError, match="was begun with steps 2, not 3"):
        train(replace(settings, steps=3), target, Silent())
    other = replace(settings.corpus, max_new_tokens=21)
    with pytest.raises(ConfigurationError, match="max_new_tokens 20, not 21"):
        train(replace(settings, out=tmp_path / "new", corpus=other), target, Silent())


def test_one_answer_is_too_few(
    settings: TrainSettings, target: TargetModel, tmp_path: Path
) -> None:
    lonely = tmp_path / "one.txt"
    lonely.write_text("the cat", "utf-8")
    corpus = CorpusSettings(tmp_path / "few", (lonely,), 20, 8)
    with pytest.raises(ConfigurationError, match="at least two are needed"):
        train(replace(settings, corpus=corpus), target, Silent())
