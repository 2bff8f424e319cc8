"""The KV cache of one session: append by running tokens, roll back by cropping.

A thin hold on transformers' `DynamicCache`. It is built without the model's config on purpose:
layers with a sliding window then keep every position and rely on the mask, which costs memory
beyond the window and in return can be cropped to any length.
"""

from __future__ import annotations

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig

from bus.errors import LocalError, ModelError


class KVCache:
    """Keys and values of positions 0 … length−1.

    Attributes:
        states: what `model(..., cache=states)` takes.
        length: number of positions held.
    """

    __slots__ = ("states",)

    def __init__(self) -> None:
        self.states = DynamicCache()

    @property
    def length(self) -> int:
        return int(self.states.get_seq_length())

    def crop(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            LocalError: `length` is negative or beyond what is held.
        """
        held = self.length
        if not 0 <= length <= held:
            raise LocalError(f"cannot crop a cache of {held} positions to {length}")
        if length == 0:
            self.states = DynamicCache()
        elif length < held:
            self.states.crop(length - held)


def require_croppable(config: PreTrainedConfig, name: str) -> None:
    """Refuse models whose state cannot be rolled back.

    Raises:
        ModelError: some layer keeps a recurrent state (Mamba, linear attention) or an index.
    """
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(
                f"model {name!r} keeps a state that cannot be rolled back "
                f"({type(layer).__name__}); speculative decoding needs a model with plain "
                "attention layers"
            )
