"""`distill`: answers, head, pruned draft, training, within a time budget, resumable.

The draft's directory is of use from the moment training begins, and its weights are only ever
replaced by newer ones. Beside the draft (see `engines.torch.draft`) it holds `work/`: the answers,
the last checkpoint and `run.json`, from which a run that was cut off goes on.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor

from bus.protocol.errors import ConfigurationError
from engines.torch.draft import DRAFT_WEIGHTS
from engines.torch.loading import LoadedModel
from training.distill.answers import Prompt, answer, read
from training.distill.batches import collate
from training.distill.evaluation import DraftQuality, evaluate
from training.distill.prompts import own_prompts, read_prompts, read_texts
from training.distill.records import Record, load_shards, save_shard, shard_path
from training.distill.state import RunState
from training.distill.student import (
    Student,
    choose_layers,
    copy_draft,
    make_student,
    prune_depth,
    save_directory,
    save_weights,
)
from training.distill.training import Training, TrainingSettings, rows_of_tokens
from training.distill.vocabulary import expected_counts, prompt_counts, rank_vocabulary
from training.runs import Progress

ANSWERS, TEXTS = "answers", "texts"
CHECKPOINT = "checkpoint.safetensors"
_HELD_OUT_EVERY, _MOST_HELD_OUT = 10, 200
_FIRST_GROUP = 24
_TEXT_LENGTH = 256
_CHECKPOINT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """What to make; the defaults are this project's choice.

    Attributes:
        out: directory of the draft.
        layers: the target's layers to keep, or how many.
        head_size: tokens of the draft's head.
        prompts, corpora: files; without prompts the target makes up its own.
        init: a draft to begin with instead of the target's layers, or None.
        budget_seconds: for everything, over all runs on this directory.
        answer_share: most of the budget that goes into the target's answers.
        max_new_tokens: longest answer. group_size: most prompts answered at once.
    """

    out: Path
    layers: tuple[int, ...] | int = 6
    head_size: int = 16_384
    prompts: tuple[Path, ...] = ()
    corpora: tuple[Path, ...] = ()
    init: str | None = None
    budget_seconds: float = 3600.0
    answer_share: float = 0.4
    max_new_tokens: int = 112
    group_size: int = 48
    seed: int = 0
    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass(frozen=True, slots=True)
class Result:
    """What came out.

    Attributes:
        initial, final: quality on answers held out from training, before it and after.
        train_tokens: answer tokens there are. seen_tokens: learnt from, each epoch counted.
        seconds: spent, over all runs.
    """

    initial: DraftQuality
    final: DraftQuality
    train_tokens: int
    seen_tokens: int
    steps: int
    seconds: float


def distill(settings: DistillSettings, target: LoadedModel, progress: Progress) -> Result:
    """Make a draft, or go on making it.

    Raises:
        ConfigurationError: the directory belongs to another run, or a file cannot be used.
        ModelError: this target cannot be pruned.
    """
    work = settings.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            state = RunState.open(work / "run.json", _identity(settings, target))
            return _distill(settings, target, state, progress)
    except Timeout as error:
        raise ConfigurationError(f"another distillation is writing to {settings.out}") from error


def _identity(settings: DistillSettings, target: LoadedModel) -> dict[str, object]:
    """What runs on one directory must have in common."""
    layers = settings.layers
    return {
        "target": target.name,
        "layers": layers if isinstance(layers, int) else list(layers),
        "head_size": settings.head_size,
        "prompts": [str(path) for path in settings.prompts],
        "corpora": [str(path) for path in settings.corpora],
        "init": settings.init,
        "seed": settings.seed,
    }


def _distill(
    settings: DistillSettings, target: LoadedModel, state: RunState, progress: Progress
) -> Result:
    work = settings.out / "work"
    progress.phase("answers")
    _collect(settings, target, state, progress)
    answers = load_shards(work, ANSWERS)
    held_out = answers[::_HELD_OUT_EVERY][:_MOST_HELD_OUT]
    held = {id(record) for record in held_out}
    learnt = [record for record in answers if id(record) not in held]
    training = _open_training(settings, target, learnt)
    learnt += load_shards(work, TEXTS)

    def examine() -> DraftQuality:
        progress.phase("evaluation")
        return _quality(training.student, target, held_out, progress)

    began = state.spent
    if state.initial is None:
        state.initial = examine()
        state.save()
    progress.phase("training")
    _train(settings, training, learnt, state, progress, reserve=state.spent - began)
    final = examine()
    state.save()
    return Result(
        initial=state.initial,
        final=final,
        train_tokens=sum(record.answer.numel() for record in learnt),
        seen_tokens=training.position.seen_tokens,
        steps=training.position.steps,
        seconds=state.spent,
    )


def _collect(
    settings: DistillSettings, target: LoadedModel, state: RunState, progress: Progress
) -> None:
    """Have prompts answered until their share of the time is over. The first group is small: only
    then it is known how many fit into the time."""
    work, share = settings.out / "work", settings.answer_share * settings.budget_seconds
    index = len(list(work.glob(f"{ANSWERS}-*")))
    taken = len(load_shards(work, ANSWERS))
    if index and state.spent >= share:
        return
    next_group = _prompt_source(settings, target, taken)
    next_texts = _text_source(settings, target, len(load_shards(work, TEXTS)))
    size = min(_FIRST_GROUP, settings.group_size)
    while group := next_group(index, size):
        began = state.spent
        records = answer(target, group, settings.max_new_tokens, lambda: state.spent >= share)
        save_shard(shard_path(work, ANSWERS, index), records)
        if texts := next_texts(size):
            save_shard(shard_path(work, TEXTS, index), texts)
        state.save()
        progress.advance(state.spent / share, sum(record.answer.numel() for record in records))
        affordable = int(size * (share - state.spent) / (state.spent - began))
        size = min(affordable, 2 * size, settings.group_size)
        index += 1
        if size < 1:
            return


def _prompt_source(
    settings: DistillSettings, target: LoadedModel, taken: int
) -> Callable[[int, int], list[Prompt]]:
    """(shard, size) → the next prompts, in an order fixed by the seed; none when all are taken."""
    if not settings.prompts:
        seed, longest_seconds = settings.seed * 100_003, 0.1 * settings.budget_seconds
        return lambda shard, size: own_prompts(target, seed + shard, size, longest_seconds)
    longest = target.context_length - settings.max_new_tokens
    prompts = [p for path in settings.prompts for p in read_prompts(path, target, longest)]
    random.Random(settings.seed).shuffle(prompts)
    rest = iter(prompts[taken:])
    return lambda _, size: list(islice(rest, size))


def _text_source(
    settings: DistillSettings, target: LoadedModel, taken: int
) -> Callable[[int], list[Record]]:
    """size → as many pieces of the corpora after those taken, read by the target, in an order
    fixed by the seed; none when there are no more."""
    pieces = [
        (piece, path.stem)
        for path in settings.corpora
        for piece in read_texts(path, target, _TEXT_LENGTH)
    ]
    random.Random(settings.seed).shuffle(pieces)
    rest = iter(pieces[taken:])
    return lambda size: [read(target, piece, name) for piece, name in islice(rest, size)]


def _open_training(
    settings: DistillSettings, target: LoadedModel, learnt: Sequence[Record]
) -> Training:
    """The draft as the last run left it, or a new one; the directory is a draft afterwards."""
    weights = settings.out / DRAFT_WEIGHTS
    checkpoint = settings.out / "work" / CHECKPOINT
    if settings.init is None:
        layers = settings.layers
        kept = choose_layers(target.model, layers) if isinstance(layers, int) else layers
        body, known = prune_depth(target.model, kept), None
    else:
        body, known = copy_draft(settings.init, target.model)
    going_on = checkpoint.is_file()
    vocab = (
        load_file(weights)["vocab"] if going_on else _vocabulary(settings, target, learnt, known)
    )
    student = make_student(body, target.model, vocab)
    training = Training(student, target.vocab_size, settings.training, target.device)
    if going_on:
        training.restore(checkpoint)
    else:
        save_directory(student, target, settings.out)
        save_weights(student, weights)
    return training


def _vocabulary(
    settings: DistillSettings,
    target: LoadedModel,
    learnt: Sequence[Record],
    known: Tensor | None,
) -> Tensor:
    """The head: what the target writes, then what stands in prompts, then what the draft to begin
    with knew."""
    counts = expected_counts(learnt, target.vocab_size)
    counts += 0.1 * prompt_counts(learnt, target.vocab_size)
    if known is not None:
        counts[known.long()] += 1e-3
    special = target.eos_tokens | set(target.tokenizer.all_special_ids)
    return rank_vocabulary(counts, settings.head_size, special)


def _quality(
    student: Student, target: LoadedModel, records: Sequence[Record], progress: Progress
) -> DraftQuality:
    rows = rows_of_tokens(student.vocab, target.vocab_size)
    steps = iter(range(1, len(records) + 1))
    return evaluate(
        lambda record: student.logits(collate([record], target.device)),
        student.vocab,
        rows,
        records,
        tick=lambda: progress.advance(next(steps) / len(records), 0),
    )["all"]


def _train(
    settings: DistillSettings,
    training: Training,
    learnt: Sequence[Record],
    state: RunState,
    progress: Progress,
    reserve: float,
) -> None:
    """Train for what is left of the budget, less `reserve` seconds for the last evaluation."""
    before, began = training.position.seconds, time.monotonic()
    total = before + settings.budget_seconds - reserve - state.spent

    def share() -> float:
        training.position.seconds = before + time.monotonic() - began
        return training.position.seconds / total if total > before else 1.0

    saved = -math.inf  # the first step is kept at once
    for loss, tokens in training.steps(learnt, share):
        progress.advance(share(), tokens, loss)
        if time.monotonic() - saved > _CHECKPOINT_SECONDS:
            _save(settings, training, state)
            saved = time.monotonic()
    _save(settings, training, state)


def _save(settings: DistillSettings, training: Training, state: RunState) -> None:
    training.save(settings.out / "work" / CHECKPOINT)
    save_weights(training.student, settings.out / DRAFT_WEIGHTS)
    state.save()
