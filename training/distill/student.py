"""The draft while it learns: some of the target's layers on its frozen embedding, trimmed head.

Depth pruning: the kept layers of the target become the layers of the draft; its embedding, final
norm and the head's rows are the target's. Works on any causal language model of transformers whose
decoder keeps its layers in one list. Only the layers and the norms behind them learn.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from bus.protocol.errors import ConfigurationError, ModelError
from engines.torch.draft import (
    EMBEDDING_WEIGHTS,
    HEAD_KEY,
    is_trimmed,
    read_trimmed,
    trimmed_location,
)
from engines.torch.draft_file import quantise
from engines.torch.loading import LoadedModel
from training.distill.batches import Batch
from training.distill.records import save_atomically


@dataclass(frozen=True, slots=True)
class Student:
    """A draft in training.

    Attributes:
        body: a decoder of transformers, without head.
        head: float[H, hidden], frozen. vocab: int32[H], sorted token ids of its rows.
    """

    body: Any
    head: Tensor
    vocab: Tensor

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name → weight of everything that learns."""
        return {n: p for n, p in self.body.named_parameters() if p.requires_grad}

    def logits(self, batch: Batch) -> Tensor:
        """float[N, H] before each of the batch's N answer tokens.

        Prompts are run without gradients: nothing of them is learnt, and they are half of all
        positions, whose backward pass would cost twice their forward pass.
        """
        cache = DynamicCache()
        before = batch.prompts.shape[1]
        positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
        if before:
            with torch.no_grad():
                self.body(
                    batch.prompts,
                    attention_mask=batch.mask[:, :before],
                    position_ids=positions[:, :before],
                    cache=cache,
                )
        hidden: Tensor = self.body(
            batch.feed,
            attention_mask=batch.mask,
            position_ids=positions[:, before:],
            cache=cache,
        ).last_hidden_state
        return nn.functional.linear(hidden[batch.where], self.head)


def make_student(body: Any, model: Any, vocab: Tensor) -> Student:
    """Put a head of the target's rows on a body, and freeze what is the target's.

    Args:
        model: the target, a causal language model. vocab: int32[H], sorted.
    """
    rows = model.get_output_embeddings().weight.detach()
    body.float().eval().requires_grad_(True)  # eval: no dropout, the aim is one fixed function
    body.get_input_embeddings().weight.requires_grad_(False)
    return Student(body, rows[vocab.long().to(rows.device)].float(), vocab)


def prune_depth(model: Any, kept: Sequence[int]) -> Any:
    """A decoder of the target's architecture, made of the target's layers `kept`.

    Raises:
        ConfigurationError: no such layer.
        ModelError: the model keeps its layers in a way this does not know.
    """
    decoder = model.get_decoder()
    depth = decoder.config.num_hidden_layers
    if not kept or not all(0 <= layer < depth for layer in kept):
        raise ConfigurationError(
            f"the target has layers 0 to {depth - 1}; the draft cannot keep {list(kept)}"
        )
    config = copy.deepcopy(decoder.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    prefix = _layers_prefix(decoder, depth)
    weights = decoder.state_dict()
    state = {name: w for name, w in weights.items() if not name.startswith(prefix)}
    for new, old in enumerate(kept):
        source = f"{prefix}{old}."
        for name, weight in weights.items():
            if name.startswith(source):
                state[f"{prefix}{new}.{name.removeprefix(source)}"] = weight
    body = type(decoder)(config)
    body.load_state_dict(state)
    return body.to(model.device)


def choose_layers(model: Any, count: int) -> tuple[int, ...]:
    """Which `count` of the target's layers to keep: two thirds from the bottom, the rest from the
    top. The lowest layers build features that no other can replace and the highest turn them into
    tokens; those between change least (Men et al., ShortGPT, 2024).

    Raises:
        ConfigurationError: more than the target has, or none.
    """
    depth = model.get_decoder().config.num_hidden_layers
    if not 1 <= count <= depth:
        raise ConfigurationError(f"the target has {depth} layers; the draft cannot have {count}")
    top = 0 if count == 1 else max(1, count // 3)
    return (*range(count - top), *range(depth - top, depth))


def copy_draft(spec: str, model: Any) -> tuple[Any, Tensor]:
    """Body and vocabulary (int32[H]) of a trimmed draft made for this target.

    Raises:
        ModelError: `spec` is no such draft.
    """
    if not is_trimmed(spec):
        raise ModelError(f"{spec!r} is no draft that `distill` made; give 'default' or a directory")
    read: tuple[Any, Tensor, Tensor] = read_trimmed(*trimmed_location(spec), torch.float32)
    body, _, vocab = read
    rows, own = body.get_input_embeddings().weight, model.get_input_embeddings().weight
    if rows.shape != own.shape:
        raise ModelError(
            f"the draft {spec!r} stands on an embedding of shape {tuple(rows.shape)}, the target's "
            f"is {tuple(own.shape)}; it was made for another target"
        )
    rows.data.copy_(own)
    return body.to(own.device), vocab


def save_weights(student: Student, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the trained part in the format of `engines.torch.draft`, atomically: matrices as int8
    with one float16 scale a row, everything else float16."""
    frozen = embedding_name(student.body)
    tensors: dict[str, Tensor] = {"vocab": student.vocab.cpu()}
    for name, weight in student.body.state_dict().items():
        if name == frozen:
            continue
        if weight.ndim == 2:
            tensors[f"{name}.int8"], tensors[f"{name}.scale"] = quantise(weight.cpu())
        else:
            tensors[name] = weight.cpu().half()
    save_atomically(path, tensors, metadata or {})


def save_directory(student: Student, target: LoadedModel, directory: Path) -> None:
    """Write what a draft directory needs besides its weights: config, tokenizer, and the rows of
    the target that the draft uses. Written once; training changes none of it."""
    student.body.config.save_pretrained(directory)
    target.tokenizer.save_pretrained(directory)
    name, model = embedding_name(student.body), target.model
    embedding = model.get_input_embeddings().weight
    tensors = {name: _stored(embedding)}
    if model.get_output_embeddings().weight.data_ptr() != embedding.data_ptr():  # not tied
        tensors[HEAD_KEY] = _stored(student.head)
    save_atomically(directory / EMBEDDING_WEIGHTS, tensors, {})


def embedding_name(body: Any) -> str:
    """Name of the input embedding among the body's weights."""
    weight = body.get_input_embeddings().weight
    name: str = next(name for name, other in body.named_parameters() if other is weight)
    return name


def _stored(weight: Tensor) -> Tensor:
    kept = weight if weight.dtype == torch.bfloat16 else weight.half()
    return kept.detach().cpu()


def _layers_prefix(decoder: Any, depth: int) -> str:
    for name, module in decoder.named_children():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return f"{name}."
    raise ModelError(
        f"{type(decoder).__name__} has no list of its {depth} layers; a draft can be pruned only "
        "from models that keep them in one"
    )
