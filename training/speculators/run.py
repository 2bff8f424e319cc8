"""`e2sci train`: answers, hidden states, training, and a directory that a worker can load.

    OUT/speculator.json, speculator.safetensors   what `engines.torch.speculators` reads
    OUT/report.json, README.md                    what was measured, and a model card
    OUT/work/                                     checkpoint and lock; the answers, unless elsewhere

Everything goes on where it was cut off. The checkpoint is replaced after every step, so that a
process that is killed loses the step it was in; a power cut loses what was made since the last
flush, at most 20 s. A run that was killed ends with the weights it would have had.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from filelock import FileLock, Timeout

from bus.protocol.errors import ConfigurationError
from engines.torch.rope import head_dim
from engines.torch.speculators.file import (
    AnyConfig,
    Eagle3Config,
    MedusaConfig,
    save_speculator,
)
from engines.torch.target import TargetModel
from training.distill.batches import plan_batches
from training.distill.vocabulary import expected_counts, prompt_counts, rank_vocabulary
from training.optimiser import Optimiser
from training.runs import Progress
from training.speculators.card import write_card
from training.speculators.corpus import (
    CorpusSettings,
    all_answers,
    check_identity,
    collect_answers,
    collect_features,
    load_texts,
)
from training.speculators.eagle3 import Eagle3
from training.speculators.medusa import Medusa
from training.speculators.quality import Quality, baselines, quality
from training.speculators.texts import Text

CHECKPOINT, REPORT = "checkpoint.safetensors", "report.json"
_FLUSH_SECONDS = 20.0
_CURVE_POINTS, _CURVE_TEXTS = 12, 20
Kind = Literal["medusa", "eagle3"]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What to make; the defaults are this project's choice, tried on the default target.

    Attributes:
        depth: Medusa's heads; of EAGLE-3 the tokens that training unrolls.
        head_size: H, tokens that can be proposed, the most frequent ones.
        steps: of the training. batch_tokens: answer tokens of a step, padding included.
    """

    kind: Kind
    out: Path
    corpus: CorpusSettings
    depth: int = 4
    head_size: int = 16_384
    steps: int = 600
    batch_tokens: int = 512
    learning_rate: float = 1e-3
    warmup: float = 0.05
    seed: int = 0


class CurvePoint(msgspec.Struct, frozen=True):
    """Quality on some of the held-out answers in mid-training."""

    step: int
    loss: float
    accepted: float


class Report(msgspec.Struct, frozen=True):
    """What a training came to; `report.json`.

    Attributes:
        final: of the trained weights, on the held-out answers; others: what counting foresees.
        train_tokens: answer tokens to learn from; seen_tokens: learnt from, each epoch counted.
        seconds: of training, over all runs.
    """

    kind: str
    target: str
    final: Quality
    others: dict[str, Quality]
    curve: tuple[CurvePoint, ...]
    train_tokens: int
    seen_tokens: int
    steps: int
    seconds: float
    settings: dict[str, Any]


class Position(msgspec.Struct):
    """How far a training is; kept with its weights."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seen_tokens: int = 0
    seconds: float = 0.0
    curve: list[CurvePoint] = []


def train(settings: TrainSettings, target: TargetModel, progress: Progress) -> Report:
    """Train a speculator, or go on training it.

    Raises:
        ConfigurationError: the directory belongs to another run, or a file cannot be used.
        ModelError: the target makes up no prompts, or the loss is not finite.
        LocalError: the target gives no hidden states.
    """
    work = settings.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            return _train(settings, target, progress)
    except Timeout:
        raise ConfigurationError(f"another training is writing to {settings.out}") from None


def _train(settings: TrainSettings, target: TargetModel, progress: Progress) -> Report:
    directory, wanted = settings.corpus.directory, settings.corpus.num_tokens
    check_identity(settings.out / "work" / "settings.json", _identity(settings, target), "--out")

    def counted(name: str) -> Callable[[int], None]:
        progress.phase(name)
        done = 0

        def tick(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress.advance(done / wanted, tokens)

        return tick

    collect_answers(settings.corpus, target, counted("answers"))
    collect_features(directory, settings.kind, target, counted("hidden states"))
    learnt, held_out = load_texts(directory, settings.kind)
    config, module = _module(settings, target)
    optimiser = Optimiser(dict(module.named_parameters()), settings.learning_rate, settings.warmup)
    position = _restored(settings, optimiser)
    progress.phase("training")
    _steps(settings, module, optimiser, position, (learnt, held_out), progress)
    progress.phase("evaluation")
    report = Report(
        kind=settings.kind,
        target=target.name,
        final=quality(module, held_out),
        others=baselines(learnt, held_out, target.vocab_size, settings.depth),
        curve=tuple(position.curve),
        train_tokens=sum(text.answer.numel() for text in learnt),
        seen_tokens=position.seen_tokens,
        steps=position.step,
        seconds=position.seconds,
        settings=_identity(settings, target),
    )
    save_speculator(settings.out, config, module.tensors())
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    (settings.out / REPORT).write_bytes(text + b"\n")
    write_card(settings.out, report)
    progress.advance(1.0, 0)
    return report


def _identity(settings: TrainSettings, target: TargetModel) -> dict[str, Any]:
    """What runs on one directory must have in common."""
    corpus = settings.corpus
    return {
        "kind": settings.kind,
        "target": target.name,
        "prompts": [str(path) for path in corpus.prompts],
        "num_tokens": corpus.num_tokens,
        "max_new_tokens": corpus.max_new_tokens,
        "depth": settings.depth,
        "head_size": settings.head_size,
        "steps": settings.steps,
        "batch_tokens": settings.batch_tokens,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
    }


def _module(settings: TrainSettings, target: TargetModel) -> tuple[AnyConfig, Medusa | Eagle3]:
    """A new module, and what its file will say of it."""
    vocab_size, body = target.vocab_size, target.causal.own[0]
    records = all_answers(settings.corpus.directory)
    counts = expected_counts(records, vocab_size) + 0.1 * prompt_counts(records, vocab_size)
    special = target.eos_tokens | set(target.tokenizer.all_special_ids)
    vocab = rank_vocabulary(counts, settings.head_size, special).long()
    config = body.config
    known: dict[str, Any] = {
        "hidden": int(config.hidden_size),
        "vocab_size": vocab_size,
        "tokenizer_digest": target.tokenizer_digest,
        "target": target.name,
        "feature_layers": target.causal.feature_layers,
    }
    with torch.no_grad():
        head_rows = target.causal.head_rows(vocab)
        embedding = target.causal.embedding_rows(torch.arange(vocab_size))
    torch.manual_seed(settings.seed)
    if settings.kind == "medusa":
        medusa = MedusaConfig(**known, num_heads=settings.depth)
        return medusa, Medusa(settings.depth, head_rows, vocab, vocab_size)
    eagle3 = Eagle3Config(
        **known,
        num_attention_heads=int(config.num_attention_heads),
        num_key_value_heads=int(config.num_key_value_heads),
        head_dim=head_dim(config),
        intermediate_size=int(config.intermediate_size),
        rope_theta=float(config.rope_parameters["rope_theta"]),
        rms_norm_eps=float(config.rms_norm_eps),
    )
    return eagle3, Eagle3(eagle3, embedding, head_rows, vocab, settings.depth)


def _restored(settings: TrainSettings, optimiser: Optimiser) -> Position:
    checkpoint = settings.out / "work" / CHECKPOINT
    if not checkpoint.is_file():
        return Position()
    return msgspec.convert(optimiser.restore(checkpoint), Position)


def _steps(
    settings: TrainSettings,
    module: Medusa | Eagle3,
    optimiser: Optimiser,
    at: Position,
    texts: tuple[Sequence[Text], Sequence[Text]],
    progress: Progress,
) -> None:
    """Train up to `settings.steps`, and keep every step."""
    (learnt, held_out), flushed = texts, time.monotonic()
    checkpoint = settings.out / "work" / CHECKPOINT
    every = max(settings.steps // _CURVE_POINTS, 1)
    while at.step < settings.steps:
        batches = plan_batches(learnt, settings.batch_tokens, settings.seed + at.epoch)
        while at.batch < len(batches) and at.step < settings.steps:
            began = time.monotonic()
            chosen = [learnt[index] for index in batches[at.batch]]
            loss = optimiser.step(module.loss(chosen), at.step / settings.steps)
            tokens = sum(text.answer.numel() for text in chosen)
            at.batch, at.step, at.seen_tokens = at.batch + 1, at.step + 1, at.seen_tokens + tokens
            if at.step % every == 0:
                point = quality(module, held_out[:_CURVE_TEXTS])
                at.curve.append(CurvePoint(at.step, loss, point.accepted))
            at.seconds += time.monotonic() - began
            durable = time.monotonic() - flushed > _FLUSH_SECONDS or at.step == settings.steps
            optimiser.save(checkpoint, msgspec.to_builtins(at), durable)
            flushed = time.monotonic() if durable else flushed
            progress.advance(at.step / settings.steps, tokens, loss)
        if at.batch >= len(batches):
            at.epoch, at.batch = at.epoch + 1, 0
