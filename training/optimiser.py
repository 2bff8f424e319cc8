"""AdamW with a warm-up and a cosine, and its state on disk, for every training here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from bus.protocol.errors import ModelError
from training.distill.records import save_atomically


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to 0, over `progress` from 0 to 1. By progress and not by
    step, because how many steps fit into the time is not always known beforehand."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class Optimiser:
    """The weights that learn, by name, and AdamW over them.

    Attributes:
        weights: float32 each, updated in place.

    Args:
        learning_rate: at its highest. warmup: share of the training in which it rises to that.
    """

    def __init__(self, weights: Mapping[str, Tensor], learning_rate: float, warmup: float) -> None:
        self.weights = dict(weights)
        self._learning_rate, self._warmup = learning_rate, warmup
        self._adamw = torch.optim.AdamW(
            self.weights.values(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, loss: Tensor, progress: float) -> float:
        """Descend by one step; returns the loss.

        Args:
            progress: of the training, 0 … 1.

        Raises:
            ModelError: the loss is not finite.
        """
        for group in self._adamw.param_groups:
            group["lr"] = self._learning_rate * learning_rate_factor(progress, self._warmup)
        self._adamw.zero_grad()
        if not torch.isfinite(loss):
            raise ModelError(
                f"the loss is {float(loss)}; the weights on disk are the last good ones. Go on "
                "with a lower learning rate"
            )
        torch.autograd.backward(loss)
        clip_grad_norm_(self.weights.values(), 1.0)
        self._adamw.step()
        return float(loss.detach())

    def save(self, path: Path, position: Mapping[str, Any], durable: bool = True) -> None:
        """Write weights, AdamW's state and a position atomically.

        Args:
            durable: the file survives a power cut; without, it survives the process.
        """
        tensors: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            tensors[f"weight/{name}"] = weight.detach().cpu()
            for key, value in self._adamw.state[weight].items():
                tensors[f"{key}/{name}"] = value.cpu()
        save_atomically(path, tensors, {"position": json.dumps(position)}, durable)

    def restore(self, path: Path) -> dict[str, Any]:
        """Go on from what `save` wrote; its position."""
        with safe_open(path, "pt") as file:
            for kind_and_name in file.keys():  # noqa: SIM118 - not a mapping
                kind, name = kind_and_name.split("/", 1)
                value, weight = file.get_tensor(kind_and_name), self.weights[name]
                if kind == "weight":
                    weight.data.copy_(value)
                else:
                    kept = value if kind == "step" else value.to(weight.device)
                    self._adamw.state[weight][kind] = kept
            position: dict[str, Any] = json.loads(file.metadata()["position"])
        return position
