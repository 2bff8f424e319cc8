"""Rotary positions (RoPE, Su et al. 2021) as tables of cosines and sines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_BLOCK = 512  # positions of the rotation table computed at a time


def rope_frequencies(config: Any) -> tuple[Tensor, float]:
    """θ of RoPE, float32[d/2], and the factor of cosines and sines, as transformers'
    `LlamaRotaryEmbedding` has them, to the bit, without its module."""
    parameters = config.rope_parameters
    if parameters["rope_type"] != "default":
        frequencies, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
        return frequencies.float(), float(scaling)
    return _plain_frequencies(head_dim(config), parameters["rope_theta"]), 1.0


def _plain_frequencies(width: int, theta: float) -> Tensor:
    frequencies: Tensor = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return frequencies


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


class Rotation:
    """RoPE's table, made as far as positions are asked for."""

    def __init__(self, frequencies: Tensor, scaling: float = 1.0) -> None:
        """Of θ, float32[d/2], and the factor of cosines and sines."""
        self._frequencies, self._scaling = frequencies, scaling
        self._cos = self._sin = torch.empty(0, 1, 2 * len(frequencies))

    @classmethod
    def of(cls, config: Any) -> Rotation:
        """Of a model of this transformers config."""
        return cls(*rope_frequencies(config))

    @classmethod
    def plain(cls, width: int, theta: float) -> Rotation:
        """Without scaling, of heads of this width."""
        return cls(_plain_frequencies(width, theta))

    def at(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """float32[n, 1, d] twice: cos mθ, and sin mθ with its sign."""
        self._reach(max(positions) + 1)
        begin, end = positions[0], positions[-1] + 1
        if end - begin == len(positions) and positions == list(range(begin, end)):
            return self._cos[begin:end], self._sin[begin:end]
        places = torch.tensor(positions)
        return self._cos[places], self._sin[places]

    def _reach(self, end: int) -> None:
        """Extend the table to positions below `end`."""
        if end > self._cos.shape[0]:
            positions = torch.arange(-(-end // _BLOCK) * _BLOCK, dtype=torch.float32)
            angles = (positions[:, None] * self._frequencies).double().numpy()
            # numpy: torch's float32 cosine has other last bits where threads cut the table
            cos = torch.from_numpy(np.cos(angles)).float() * self._scaling
            sin = torch.from_numpy(np.sin(angles)).float() * self._scaling
            self._cos = torch.cat((cos, cos), dim=1)[:, None]
            self._sin = torch.cat((-sin, sin), dim=1)[:, None]


def turned(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """RoPE of float32[n, heads, d]."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), signed_sin)
