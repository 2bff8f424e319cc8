"""Training: loss on the target's probabilities, batches of like lengths, learning rate, state.

The loss at a position is the cross-entropy of the draft against the target's top-K probabilities
p, as far as the draft's head has those tokens: −Σ p ln q, whose minimum is q = p. Prompts are run
but not learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from engines.torch.precision import has_native_bfloat16
from training.distill.batches import Batch, collate, plan_batches
from training.distill.records import Record
from training.distill.student import Student
from training.optimiser import Optimiser


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train; the defaults are this project's choice, tried on the default target.

    Attributes:
        learning_rate: AdamW's at its highest.
        warmup: share of the training in which it rises to that; then it falls to 0 by a cosine.
        batch_tokens: answer tokens of one step, padding included.
        epochs: most passes over the answers; the time budget may end the training sooner.
        seed: of the order of batches.
    """

    learning_rate: float = 4e-4
    warmup: float = 0.05
    batch_tokens: int = 512
    epochs: int = 30
    seed: int = 0


@dataclass(slots=True)
class Position:
    """Where a training stands.

    Attributes:
        epoch, batch: the next batch to run. steps: steps made.
        seen_tokens: answer tokens learnt from, each epoch counted. seconds: spent in training.
    """

    epoch: int = 0
    batch: int = 0
    steps: int = 0
    seen_tokens: int = 0
    seconds: float = 0.0


def distillation_loss(logits: Tensor, batch: Batch, row_of_token: Tensor) -> Tensor:
    """Mean of −Σ p ln q over the batch's positions.

    Args:
        logits: float[N, H]. row_of_token: int64[V], the head's row of a token, −1 for none.
    """
    rows = row_of_token[batch.top_ids.long()]
    probs = batch.top_probs.float() * (rows >= 0)
    logits = logits.float()
    at_top = logits.gather(1, rows.clamp(min=0))
    return (probs * (logits.logsumexp(1, keepdim=True) - at_top)).sum(1).mean()


def rows_of_tokens(vocab: Tensor, vocab_size: int) -> Tensor:
    """int64[vocab_size]: the head's row of each token, −1 for none."""
    rows = torch.full((vocab_size,), -1)
    rows[vocab.long().cpu()] = torch.arange(vocab.numel())
    return rows


class Training:
    """A student, its optimiser and where they stand.

    Attributes:
        position: advanced by `steps`.
    """

    def __init__(
        self, student: Student, vocab_size: int, settings: TrainingSettings, device: torch.device
    ) -> None:
        self.student, self.settings, self.position = student, settings, Position()
        self._device = device
        self._row_of_token = rows_of_tokens(student.vocab, vocab_size).to(device)
        self._optimiser = Optimiser(student.trainable(), settings.learning_rate, settings.warmup)

    def steps(
        self, records: Sequence[Record], time_share: Callable[[], float]
    ) -> Iterator[tuple[float, int]]:
        """Train until the epochs or the time are over; yields loss and answer tokens of each step.

        Args:
            time_share: how much of the time has passed, 0 … 1.
        """
        at, settings = self.position, self.settings
        while at.epoch < settings.epochs:
            batches = plan_batches(records, settings.batch_tokens, settings.seed + at.epoch)
            while at.batch < len(batches):
                passed = (at.epoch + at.batch / len(batches)) / settings.epochs
                progress = max(passed, time_share())
                if progress >= 1.0:
                    return
                chosen = [records[index] for index in batches[at.batch]]
                loss = self._step(collate(chosen, self._device), progress)
                tokens = sum(record.answer.numel() for record in chosen)
                at.batch, at.steps = at.batch + 1, at.steps + 1
                at.seen_tokens += tokens
                yield loss, tokens
            at.epoch, at.batch = at.epoch + 1, 0

    def _step(self, batch: Batch, progress: float) -> float:
        with self._precision():
            logits = self.student.logits(batch)
        loss = distillation_loss(logits, batch, self._row_of_token)
        return self._optimiser.step(loss, progress)

    def _precision(self) -> AbstractContextManager[object]:
        """bfloat16 products where the hardware has them; weights and their updates stay float32."""
        if has_native_bfloat16(self._device):
            return torch.autocast(self._device.type, torch.bfloat16)
        return nullcontext()

    def save(self, path: Path) -> None:
        """Write weights, optimiser and position atomically."""
        self._optimiser.save(path, asdict(self.position))

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        self.position = Position(**self._optimiser.restore(path))
