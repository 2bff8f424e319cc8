"""What a target and a drafter of torch share: a loaded model with the caches of its sessions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from decoding.sampling import SamplingParams
from engines.padding import Padding
from engines.torch.loading import Loaded
from engines.torch.prefixes import Prefix, PrefixCache
from engines.torch.rowwise import exp_sum


@dataclass(slots=True)
class SessionCache:
    """One session's cache, and how its tokens are chosen."""

    prefix: Prefix
    sampling: SamplingParams

    @property
    def length(self) -> int:
        """Positions held: the position of the next token run."""
        return self.prefix.length


CacheType = TypeVar("CacheType", bound=SessionCache)


class RunningModel(Generic[CacheType]):
    """A model that runs, with its tokenizer.

    Attributes:
        padding: makes passes last at least a set time, to measure as on another device.
        prefixes: lets sessions reuse what others have run; off until a worker replaces it.
        Others as in `engines.torch.loading.Loaded`.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.tokenizer = loaded.tokenizer
        self.tokenizer_digest = loaded.tokenizer_digest
        self.name = loaded.name
        self.dtype = loaded.dtype
        self.device = loaded.device
        self.context_length = loaded.context_length
        self.vocab_size = loaded.vocab_size
        self.padding = Padding()
        self.prefixes = PrefixCache()
        exp_sum(torch.zeros(1, 1))  # compiled or loaded now, not in a session's first pass

    def length(self, cache: CacheType) -> int:
        """Positions held."""
        return cache.length

    def close(self, cache: CacheType) -> None:
        """The session has ended: keep what it has run for others."""
        self.prefixes.keep(cache.prefix)
