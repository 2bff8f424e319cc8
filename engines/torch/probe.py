"""What a network computes here, in a digest, and whether the split into passes changes it.

A few tokens cannot prove that it never does: matrix products of floating point agree at some sizes
and not at others. So only a network that computes row by row is called bitwise, and only where the
probe agrees.

Two workers whose digests are equal run the same weights in the same number format on processors
that round alike: where they are bitwise as well, they give the same tokens for the same text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engines.torch.cache import KVCache

_LENGTH = 8


class Network(Protocol):
    """A target's or draft's forward pass; `rowwise` as of an `engines.torch.network.Network`."""

    @property
    def rowwise(self) -> bool: ...

    def logits(self, input_ids: Tensor, cache: KVCache, num_rows: int) -> Tensor:
        """Run int64[n] after what `cache` holds; float[num_rows, V] of the last positions."""
        ...


@dataclass(frozen=True, slots=True)
class Probe:
    """What came out.

    Attributes:
        digest: hex SHA-256 of the logits of a fixed text of 8 tokens.
        bitwise: the network is row-wise, and they had the same bits in one pass, token by token
            and in windows.
    """

    digest: str
    bitwise: bool

    def __str__(self) -> str:
        return f"{'bitwise' if self.bitwise else 'not bitwise'}, probe {self.digest[:8]}"


@torch.inference_mode()
def probe(network: Network, vocab_size: int, device: torch.device) -> Probe:
    """Run the probe: three passes of several tokens and three of one."""
    ids = (torch.arange(1, _LENGTH + 1, device=device) * 7919) % vocab_size
    whole = network.logits(ids, KVCache(), _LENGTH)
    parts = [_in_parts(network, ids, [5, 1, 1, 1]), _in_parts(network, ids, [2, _LENGTH - 2])]
    digest = hashlib.sha256(whole.float().cpu().contiguous().numpy().tobytes()).hexdigest()
    return Probe(digest, network.rowwise and all(torch.equal(part, whole) for part in parts))


def _in_parts(network: Network, ids: Tensor, sizes: list[int]) -> Tensor:
    """float[n, V] logits of all positions, run in passes of these sizes."""
    cache = KVCache()
    return torch.cat([network.logits(part, cache, len(part)) for part in torch.split(ids, sizes)])
