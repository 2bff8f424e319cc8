"""`distill` from end to end, on a tiny random target."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bus.protocol.errors import ConfigurationError
from decoding.sampling import SamplingParams
from engines.torch.draft import DRAFT_WEIGHTS
from engines.torch.drafter import ModelDrafter
from engines.torch.loading import LoadedModel, load_causal_lm
from tests.engines.tiny import save_tiny
from tests.training.silent import Silent
from training.distill.records import load_shards
from training.distill.run import DistillSettings, distill
from training.distill.state import RunState
from training.distill.training import TrainingSettings

HEAD_SIZE = 150


@pytest.fixture
def target(tmp_path: Path) -> LoadedModel:
    return load_causal_lm(str(save_tiny(tmp_path / "target", num_layers=4)), "float32", "cpu")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"the dog and {n} cats ran\n" for n in range(60)), "utf-8")
    return path


def settings(
    out: Path, prompts: Path | None, epochs: int = 100_000, **changed: object
) -> DistillSettings:
    """Where a test needs steps, it sets epochs and leaves more than enough time: how many steps
    fit into a time depends on what else the machine does."""
    values: dict[str, object] = {
        "out": out,
        "layers": 2,
        "head_size": HEAD_SIZE,
        "prompts": () if prompts is None else (prompts,),
        "max_new_tokens": 24,
        "training": TrainingSettings(learning_rate=3e-3, epochs=epochs),
    }
    return DistillSettings(**values | changed)  # type: ignore[arg-type]


def killed_in_training(target: Path, out: Path, prompts: Path) -> None:
    """Run the command as a user would, and kill -9 it once it has trained."""
    flags = ["--target", str(target), "--out", str(out), "--prompts", str(prompts)]
    flags += ["--layers", "2", "--head-size", str(HEAD_SIZE), "--max-new-tokens", "24"]
    command = [sys.executable, "-m", "cli.main", "distill", *flags]
    running = subprocess.Popen(
        [*command, "--budget", "10", "--epochs", "100000"], stderr=subprocess.DEVNULL
    )
    try:
        while not (out / "work" / "checkpoint.safetensors").exists():
            assert running.poll() is None
            time.sleep(0.02)
    finally:
        running.kill()
        assert running.wait() == -signal.SIGKILL


@pytest.mark.long
def test_a_killed_distillation_goes_on_improves_its_draft_and_serves(
    target: LoadedModel, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "draft"
    killed_in_training(tmp_path / "target", out, prompts)
    ModelDrafter.load(str(out), "float32", "cpu")  # what the kill left is a draft
    answered = load_shards(out / "work", "answers")
    begun = RunState.open(out / "work" / "run.json", {})
    again = settings(out, prompts, epochs=60, budget_seconds=begun.spent + 90.0)
    result = distill(again, target, Silent())
    assert result.initial == begun.initial  # of the first run: this one did not begin anew
    assert len(load_shards(out / "work", "answers")) == len(answered) == 60
    # Overlap is smooth; of 93 argmaxes of a random target several hang on a CPU's rounding.
    assert result.final.overlap > result.initial.overlap + 0.05
    assert result.final.agreement > result.initial.agreement
    assert result.final.mean_jsd < result.initial.mean_jsd
    draft = ModelDrafter.load(str(out), "float32", "cpu")
    assert draft.tokenizer_digest == target.tokenizer_digest
    assert served_agreement(draft, out) > result.initial.agreement + 0.1


class Interrupted(Silent):
    """Pulls the plug after the first group of answers."""

    def advance(self, share: float, tokens: int, loss: float | None = None) -> None:
        raise KeyboardInterrupt


@pytest.mark.long
def test_a_distillation_that_goes_on_reads_on_in_its_corpora(
    target: LoadedModel, prompts: Path, tmp_path: Path
) -> None:
    """Begun anew, it would learn the same pieces twice and never see the last ones."""
    out, corpus = tmp_path / "draft", tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"the {n} cats of {n * n} " * 60 for n in range(60)), "utf-8")
    asked = settings(out, prompts, epochs=1, corpora=(corpus,), budget_seconds=600.0)
    with pytest.raises(KeyboardInterrupt):
        distill(asked, target, Interrupted())
    first = load_shards(out / "work", "texts")
    assert first
    distill(asked, target, Silent())
    texts = [(*r.prompt.tolist(), *r.answer.tolist()) for r in load_shards(out / "work", "texts")]
    assert len(texts) > len(first)
    assert len(set(texts)) == len(texts)


def served_agreement(draft: ModelDrafter, out: Path) -> float:
    """Share of the answers' tokens that the served draft would have written, greedily."""
    hits = num_tokens = 0
    for record in load_shards(out / "work", "answers")[::6]:
        cache = draft.open(SamplingParams())
        feed = record.prompt.tolist()
        for token in record.answer.tolist():
            hits += draft.draft(cache, feed, 1, frozenset(), lambda: False).tokens == (token,)
            num_tokens, feed = num_tokens + 1, [token]
    return hits / num_tokens


def test_without_prompts_the_target_makes_up_its_own(target: LoadedModel, tmp_path: Path) -> None:
    own = settings(tmp_path / "draft", None, epochs=1, budget_seconds=10.0, answer_share=0.08)
    result = distill(own, target, Silent())
    records = load_shards(tmp_path / "draft" / "work", "answers")
    assert {record.prompt_set for record in records} == {"own"}
    assert len({tuple(record.prompt.tolist()) for record in records}) > len(records) // 2
    assert result.steps > 0


@pytest.mark.long
def test_a_finished_draft_is_gone_on_with_and_one_of_other_settings_is_refused(
    target: LoadedModel, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "draft"
    first = distill(settings(out, prompts, epochs=1, budget_seconds=600.0), target, Silent())
    second = distill(settings(out, prompts, epochs=3, budget_seconds=1200.0), target, Silent())
    assert second.steps == 3 * first.steps > 0
    with pytest.raises(ConfigurationError, match="begun with layers 2, not 3"):
        distill(settings(out, prompts, layers=3), target, Silent())


def test_a_draft_can_begin_with_another(target: LoadedModel, prompts: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    distill(settings(first, prompts, epochs=2, budget_seconds=30.0), target, Silent())
    again = settings(second, prompts, init=str(first), budget_seconds=1e-6)
    assert distill(again, target, Silent()).steps == 0
    trained, copied = (load_file(out / DRAFT_WEIGHTS) for out in (first, second))
    assert trained.keys() == copied.keys()
    for name in trained.keys() - {"vocab"}:  # the head's tokens are ranked anew
        step = 1.0 if name.endswith(".int8") else 1e-3  # rounded a second time
        torch.testing.assert_close(copied[name], trained[name], rtol=0, atol=step)
    assert ModelDrafter.load(str(second), "float32", "cpu").num_sparse > 1


def test_texts_are_learnt_from_besides(target: LoadedModel, prompts: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat and the dog ran to the house\n" * 9, "utf-8")
    out = tmp_path / "draft"
    distill(settings(out, prompts, corpora=(corpus,), budget_seconds=0.5), target, Silent())
    texts = load_shards(out / "work", "texts")
    assert {record.prompt_set for record in texts} == {"corpus"}
    assert all(record.prompt.numel() == 1 for record in texts)


def test_two_distillations_do_not_write_one_directory(
    target: LoadedModel, prompts: Path, tmp_path: Path
) -> None:
    from filelock import FileLock

    work = tmp_path / "draft" / "work"
    work.mkdir(parents=True)
    with FileLock(work / "lock"), pytest.raises(ConfigurationError, match="another distillation"):
        distill(settings(tmp_path / "draft", prompts), target, Silent())
