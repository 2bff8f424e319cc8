"""A draft as a target: any spec of a draft, whatever its head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engines.catalog.registry import split_head
from engines.torch.draft import DraftNetwork, LoadedDraft, is_trimmed, load_draft
from engines.torch.network import Network
from engines.torch.parts import Part
from engines.torch.target import TargetModel

_NEVER = -1e9
"""The logit of a token that the head lacks: its probability is 0 at every temperature, and it is
finite, so that differences are numbers."""


def load_as_target(spec: str, dtype: str = "auto", device: str = "auto") -> TargetModel:
    """A draft by its spec, as a target; arguments and errors as `engines.torch.draft.load_draft`.

    Where its head is whole it is an ordinary target, with all of a target's capabilities.
    """
    if split_head(spec)[1] is None and not is_trimmed(spec):
        return TargetModel.load(spec, dtype, device)
    return NarrowTarget(load_draft(spec, dtype, device))


class WidenedNetwork(Network):
    """A network whose head has part of the vocabulary, with rows of the whole.

    Attributes:
        weight_bytes: bytes of weights that a pass reads.

    Args:
        network: its `vocab` says which tokens its head has; None: all.
        vocab_size: V.
    """

    def __init__(self, network: DraftNetwork, vocab_size: int) -> None:
        self._network = network
        self.weight_bytes = network.weight_bytes
        self.rowwise = network.rowwise
        self._vocab_size = vocab_size
        vocab = network.vocab
        self._vocab = None if vocab is None else torch.from_numpy(vocab).long()

    def run(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
        """As `Network.run`."""
        narrow, _ = self._network.run(parts)
        if self._vocab is None:
            return narrow[:, : self._vocab_size], None
        rows = torch.full((narrow.shape[0], self._vocab_size), _NEVER, device=narrow.device)
        rows[:, self._vocab.to(narrow.device)] = narrow.float()
        return rows, None


class NarrowTarget(TargetModel):
    """A draft with a head of the most frequent tokens as a `decoding.engine.Target`: it never
    chooses another token. Passes are chains."""

    def __init__(self, loaded: LoadedDraft) -> None:
        """Take over `loaded`."""
        network = WidenedNetwork(loaded.network, loaded.vocab_size)
        eos = loaded.tokenizer.eos_token_id
        self._set_up(loaded, network, frozenset(() if eos is None else (int(eos),)), own_body=False)
