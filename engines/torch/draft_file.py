"""What the file of a trimmed draft holds (format: `engines.torch.draft`), and what is wrong with
it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bus.protocol.errors import ModelError


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float[rows, columns] → int8[rows, columns] and float16[rows] with weight ≈ int8 × scale."""
    scale = (weight.float().abs().amax(dim=1) / 127).half().clamp(min=2.0**-24)
    rounded = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return rounded.to(torch.int8), scale


def dequantise(stored: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Stored tensors → a state dict of plain weights in `dtype`."""
    plain: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(".int8"):
            weight = name.removesuffix(".int8")
            scale = stored[f"{weight}.scale"].float()
            plain[weight] = (tensor.float() * scale[:, None]).to(dtype)
        elif not name.endswith(".scale"):
            plain[name] = tensor.to(dtype)
    return plain


def check_vocab(vocab: Tensor, num_rows: int, weights: Path) -> None:
    """Raises ModelError where `vocab` is not rising or lies beyond the embedding's rows."""
    ascending = bool((vocab[1:] > vocab[:-1]).all())
    if vocab.numel() == 0 or not ascending or vocab[0] < 0 or vocab[-1] >= num_rows:
        raise ModelError(
            f"draft {weights}: 'vocab' must be rising token ids below {num_rows}, the rows of the "
            "target's embedding; these weights belong to another target"
        )


def depth(layers: dict[str, Tensor], weights: Path) -> int:
    """How many layers a draft has; raises ModelError where it has none."""
    found = len({name.split(".")[1] for name in layers if name.startswith("layers.")})
    if found == 0:
        raise ModelError(f"draft {weights} holds no layers; expected tensors 'layers.N.…'")
    return found


def misfit(weights: Path, what: str) -> ModelError:
    """The error of a draft that is loaded on another target than it was made for."""
    return ModelError(f"draft {weights} does not fit the target it is loaded on: {what}")
