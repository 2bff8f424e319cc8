"""Random speculators for tests, and what their formulas give, computed in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.torch.features import feature_layers
from engines.torch.speculators.file import (
    EAGLE3,
    MEDUSA,
    AnyConfig,
    Eagle3Config,
    MedusaConfig,
    SpeculatorFile,
    save_speculator,
)
from engines.torch.target import TargetModel

KINDS = (MEDUSA, EAGLE3)


def random_config(kind: str, target: TargetModel, num_heads: int = 4) -> AnyConfig:
    model = target.causal.own[0].config
    common = {
        "hidden": model.hidden_size,
        "vocab_size": target.vocab_size,
        "tokenizer_digest": target.tokenizer_digest,
        "target": target.name,
        "feature_layers": feature_layers(model.num_hidden_layers),
    }
    if kind == MEDUSA:
        return MedusaConfig(**common, num_heads=num_heads)
    return Eagle3Config(
        **common,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.hidden_size // model.num_attention_heads,
        intermediate_size=model.intermediate_size,
        rope_theta=10000.0,
        rms_norm_eps=model.rms_norm_eps,
    )


def random_tensors(config: AnyConfig, num_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Distributions that are far from uniform."""
    source = torch.Generator().manual_seed(seed)
    tensors = {"vocab": torch.randperm(config.vocab_size, generator=source)[:num_tokens].sort()[0]}
    for name, shape in config.shapes(num_tokens).items():
        if name.endswith("norm"):
            tensors[name] = 0.5 + torch.rand(shape, generator=source)
        else:
            scale = 3 if name.startswith("head.") else 1
            tensors[name] = scale * torch.randn(shape, generator=source) / shape[-1] ** 0.5
    return tensors


def save_random(
    directory: Path, kind: str, target: TargetModel, num_tokens: int = 40, seed: int = 0
) -> Path:
    """A speculator that fits the target; returns its directory."""
    config = random_config(kind, target)
    save_speculator(directory, config, random_tensors(config, num_tokens, seed))
    return directory


def normed(x: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()


def expected_probs(
    file: SpeculatorFile, target: TargetModel, text: Sequence[int], path: Sequence[int],
    first: int = 0,
) -> Tensor:  # fmt: skip
    """float32[H]: after a text, whose last token has not run, and a path of drafted tokens; with
    the features of positions from `first` on alone, for EAGLE-3."""
    tensors = file.tensors()
    if isinstance(file.config, MedusaConfig):
        h = target.features(text[:-1]).last[-1]
        weight, bias = (tensors[f"heads.{len(path)}.{part}"] for part in ("weight", "bias"))
        y = h + F.silu(weight @ h + bias)
        logits: Tensor = target.causal.head_rows(file.vocab) @ y
        return logits.softmax(dim=0)
    assert isinstance(file.config, Eagle3Config)
    return _eagle3(file.config, tensors, target, text, path, first)


def _eagle3(
    config: Eagle3Config, tensors: Mapping[str, Tensor], target: TargetModel, text: Sequence[int],
    path: Sequence[int], first: int,
) -> Tensor:  # fmt: skip
    epsilon = config.rms_norm_eps
    streams = normed(target.features(text[:-1]).low_mid_high[first:], epsilon).flatten(1)
    g = streams @ tensors["fc.weight"].T
    following = [*text[first + 1 :], *path]
    a = torch.empty(0)
    while True:  # once for each token of the path, and once before it
        size = len(g)
        embedded = target.causal.embedding_rows(torch.tensor(following[:size]))
        u = torch.cat(
            (normed(embedded, epsilon) * tensors["embed_norm"],
             normed(g, epsilon) * tensors["feature_norm"]), dim=1,
        )  # fmt: skip
        h = g + _attention(config, tensors, u)
        m = normed(h, epsilon) * tensors["mlp_norm"]
        gated = F.silu(m @ tensors["gate_proj.weight"].T) * (m @ tensors["up_proj.weight"].T)
        a = h + gated @ tensors["down_proj.weight"].T
        if size == len(following):
            break
        g = torch.cat((g, a[-1:]))
    logits: Tensor = tensors["head.weight"] @ (normed(a[-1], epsilon) * tensors["out_norm"])
    return logits.softmax(dim=0)


def _attention(config: Eagle3Config, tensors: Mapping[str, Tensor], u: Tensor) -> Tensor:
    size, width = len(u), config.head_dim
    q, k, v = (
        (u @ tensors[f"{name}_proj.weight"].T).view(size, -1, width).transpose(0, 1)
        for name in "qkv"
    )
    frequencies = config.rope_theta ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(size)[:, None] * torch.cat((frequencies, frequencies))

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()

    group = config.num_attention_heads // config.num_key_value_heads
    k, v = (x.repeat_interleave(group, dim=0) for x in (rotated(k), v))
    scores = rotated(q) @ k.transpose(1, 2) / width**0.5
    scores = scores + torch.full((size, size), -torch.inf).triu(1)
    mixed = (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(size, -1)
    out: Tensor = mixed @ tensors["o_proj.weight"].T
    return out
