"""Training: loss on the target's probabilities, batches of like lengths, learning rate, state.

The loss at a position is the cross-entropy of the draft against the target's top-K probabilities
p, as far as the draft's head has those tokens: −Σ p ln q, whose minimum is q = p. Prompts are run
but not learnt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from bus.protocol.errors import ModelError
from engines.torch.precision import has_native_bfloat16
from training.distill.batches import Batch, collate, plan_batches
from training.distill.records import Record, save_atomically
from training.distill.student import Student


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


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to 0, over `progress` from 0 to 1. By progress and not by
    step, because how many steps fit into the time is not known beforehand."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


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
        self._weights = student.trainable()
        self._optimiser = torch.optim.AdamW(
            self._weights.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

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
        factor = learning_rate_factor(progress, self.settings.warmup)
        for group in self._optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * factor
        with self._precision():
            logits = self.student.logits(batch)
        loss = distillation_loss(logits, batch, self._row_of_token)
        self._optimiser.zero_grad()
        if not torch.isfinite(loss):
            raise ModelError(
                f"the loss is {float(loss)}; the weights on disk are the last good ones. Go on "
                "with a lower learning rate"
            )
        torch.autograd.backward(loss)
        clip_grad_norm_(self._weights.values(), 1.0)
        self._optimiser.step()
        return float(loss.detach())

    def _precision(self) -> AbstractContextManager[object]:
        """bfloat16 products where the hardware has them; weights and their updates stay float32."""
        if has_native_bfloat16(self._device):
            return torch.autocast(self._device.type, torch.bfloat16)
        return nullcontext()

    def save(self, path: Path) -> None:
        """Write weights, optimiser and position atomically."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            tensors[f"weight/{name}"] = weight.detach().cpu()
            for key, value in self._optimiser.state[weight].items():
                tensors[f"{key}/{name}"] = value.cpu()
        save_atomically(path, tensors, {"position": json.dumps(asdict(self.position))})

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        with safe_open(path, "pt") as file:
            for kind_and_name in file.keys():  # noqa: SIM118 - not a mapping
                kind, name = kind_and_name.split("/", 1)
                value, weight = file.get_tensor(kind_and_name), self._weights[name]
                if kind == "weight":
                    weight.data.copy_(value)
                else:
                    kept = value if kind == "step" else value.to(self._device)
                    self._optimiser.state[weight][kind] = kept
            self.position = Position(**json.loads(file.metadata()["position"]))
