"""Hidden states of a target, as speculators read them.

A *tap* receives the hidden states of all rows of a pass: the residual stream after chosen layers,
and after the last norm without its gain, x / √(mean x² + ε). They are in the basis of the body that
runs the pass: an int8 body's is rotated (`engines.torch.rotation`). `Features` are in the model's
own basis, from every body alike, so that weights trained on one fit the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def feature_layers(num_layers: int) -> tuple[int, int, int]:
    """After how many of L layers the residual stream is read: (2, L//2, L−3), within 1 … L and
    rising where L is at least 3."""
    low, middle, high = sorted(
        min(max(count, 1), num_layers) for count in (2, num_layers // 2, num_layers - 3)
    )
    middle = max(middle, low + 1)
    high = min(max(high, middle + 1), num_layers)
    middle = max(min(middle, high - 1), 1)
    return max(min(low, middle - 1), 1), middle, high


class Tap:
    """Receives the hidden states of one pass.

    Attributes:
        layers: counts of layers, rising, each once.
        streams: float32[layers, n, hidden], the residual stream of all rows after so many layers.
        last: float32[n, hidden], after the last norm without its gain.
    """

    __slots__ = ("last", "layers", "streams")

    def __init__(self, layers: Sequence[int]) -> None:
        """Of the residual stream after these counts of layers, which may repeat."""
        self.layers = tuple(sorted(set(layers)))
        self.streams = self.last = torch.empty(0)

    def after(self, layers: Sequence[int], rows: slice = slice(None)) -> Tensor:
        """float32[n, layers, hidden]: of some rows the streams after these counts, each one of
        `self.layers`."""
        places = [self.layers.index(count) for count in layers]
        return self.streams[places, rows].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Features:
    """Hidden states of n tokens in the model's own basis.

    Attributes:
        low_mid_high: float32[n, 3, hidden], the residual stream after `feature_layers`.
        last: float32[n, hidden], after the last norm without its gain.
    """

    low_mid_high: Tensor
    last: Tensor

    @classmethod
    def of(cls, taps: Sequence[Tap], layers: Sequence[int], basis: Tensor | None) -> Features:
        """Of the passes of a text, one after the other.

        Args:
            layers: counts of `feature_layers`. basis: float32[hidden, hidden], Q of the rotated
                states x·Q that the taps hold; None: they are not rotated.
        """
        streams = torch.cat([tap.after(layers) for tap in taps])
        last = torch.cat([tap.last for tap in taps])
        if basis is not None:
            streams, last = streams @ basis.T, last @ basis.T
        return cls(streams, last)
