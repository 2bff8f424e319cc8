"""The KV cache of one session: append by running tokens, roll back by cropping.

A thin hold on transformers' `Cache`, whose layers here write into memory reserved in blocks: a
step copies its own keys and values, not all before them, and cropping moves a number. Every layer
is of this kind whatever the model's config says: with a sliding window it keeps every position and
relies on the mask, which costs memory beyond the window and in return can be cropped to any length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig

from bus.protocol.errors import LocalError, ModelError

_BLOCK = 256  # positions reserved at a time; as long as a chunk of prefill


class BlockLayer(DynamicLayer):  # type: ignore[misc]  # transformers is read as Any
    """One layer's keys and values; `keys` and `values` are views of the positions held.

    Views handed out earlier change when positions are cropped and written again.
    """

    def __init__(self) -> None:
        self._length = 0
        self._key_block = self._value_block = torch.empty(0)
        super().__init__()
        self.is_initialized = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append float[1, heads, n, d] keys and values; returns all that are held."""
        del args, kwargs  # of no use to a cache that keeps everything
        begin, end = self._length, self._length + key_states.shape[-2]
        if not self.is_initialized or end > self._key_block.shape[-2]:
            self._key_block = self._reserve(self.keys, key_states, end)
            self._value_block = self._reserve(self.values, value_states, end)
            self.device, self.is_initialized = key_states.device, True
        self._key_block[..., begin:end, :] = key_states.detach()
        self._value_block[..., begin:end, :] = value_states.detach()
        self._length = end
        return self._key_block[..., :end, :], self._value_block[..., :end, :]

    def extend(self, count: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Hold `count` more positions of float32, for the caller to write; keys and values with
        the memory reserved after them: float32[1, heads, capacity, d]."""
        end = self._length + count
        if not self.is_initialized or end > self._key_block.shape[-2]:
            new = torch.empty(1, num_heads, 0, head_dim)
            self._key_block = self._reserve(self.keys, new, end)
            self._value_block = self._reserve(self.values, new, end)
            self.device, self.is_initialized = new.device, True
        self._length = end
        return self._key_block, self._value_block

    @property
    def keys(self) -> Tensor | None:
        """float[1, heads, length, d]."""
        return self._key_block[..., : self._length, :] if self.is_initialized else None

    @keys.setter
    def keys(self, _: object) -> None:
        """transformers assigns None to begin with."""

    @property
    def values(self) -> Tensor | None:
        """float[1, heads, length, d]."""
        return self._value_block[..., : self._length, :] if self.is_initialized else None

    @values.setter
    def values(self, _: object) -> None: ...

    def get_seq_length(self) -> int:
        """Positions held."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −`tokens_to_remove` positions, as transformers counts."""
        self._length += tokens_to_remove

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on, if there are any."""
        self._length = min(self._length, length)

    def move(self, places: Tensor, begin: int) -> None:
        """Copy the positions int64[n] to `begin` … begin+n−1."""
        end = begin + len(places)
        for block in (self._key_block, self._value_block):
            block[..., begin:end, :] = block[..., places.to(block.device), :]

    @property
    def num_bytes(self) -> int:
        """Memory reserved."""
        blocks = (self._key_block, self._value_block)
        return sum(block.numel() * block.element_size() for block in blocks)

    @torch.inference_mode(False)  # else only passes in inference mode could write into the block
    def _reserve(self, held: Tensor | None, new: Tensor, length: int) -> Tensor:
        """Room for `length` positions and more, with what was held in front."""
        capacity = -(-length // _BLOCK) * _BLOCK
        block = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
        if held is not None:
            block[..., : self._length, :] = held
        return block


class KVCache:
    """Keys and values of positions 0 … length−1.

    Attributes:
        states: what `model(..., cache=states)` takes.
        length: number of positions held.
    """

    __slots__ = ("states",)

    def __init__(self) -> None:
        self.states = Cache(layer_class_to_replicate=BlockLayer)

    @property
    def length(self) -> int:
        return int(self.states.get_seq_length())

    def extend(
        self, count: int, num_layers: int, num_heads: int, head_dim: int
    ) -> tuple[npt.NDArray[np.int64], int]:
        """Hold `count` more positions in float32, for the caller to write.

        Returns:
            int64[2, num_layers], where each layer's keys and values, float32[num_heads, capacity,
            head_dim], are in memory until the cache is next extended; and the capacity.
        """
        layers = self.states.layers
        layers += [BlockLayer() for _ in range(num_layers - len(layers))]
        blocks = [layer.extend(count, num_heads, head_dim) for layer in layers]
        addresses = [[keys.data_ptr(), values.data_ptr()] for keys, values in blocks]
        return np.array(addresses, np.int64).T.copy(), int(blocks[0][0].shape[-2])

    @property
    def num_bytes(self) -> int:
        """Memory reserved, beyond what is held too."""
        return sum(layer.num_bytes for layer in self.states.layers)

    def append(self, source: KVCache, end: int) -> None:
        """Copy positions `length` … `end`−1 of another cache of the same model.

        Raises:
            LocalError: `source` holds fewer than `end`, or this cache no fewer.
        """
        begin = self.length
        if not begin < end <= source.length:
            raise LocalError(
                f"cannot copy positions {begin} … {end - 1} of a cache of {source.length}"
            )
        for index, layer in enumerate(source.states.layers):
            keys, values = layer.keys[..., begin:end, :], layer.values[..., begin:end, :]
            self.states.update(keys, values, index)

    def keep(self, length: int, path: Sequence[int] = ()) -> None:
        """Forget every position from `length` on, but for some of them, which move together.

        Args:
            path: rising, counted from `length`.

        Raises:
            LocalError: `length` or `path` lies beyond what is held, or the path does not rise.
        """
        held = self.length
        if not 0 <= length <= held:
            raise LocalError(f"cannot keep {length} positions of a cache of {held}")
        if list(path) != sorted(set(path)) or not all(0 <= i < held - length for i in path):
            raise LocalError(
                f"cannot keep the path {list(path)} of {held - length} positions; expected rising "
                "indices of them"
            )
        if list(path) != list(range(len(path))):
            places = torch.tensor([length + index for index in path])
            for layer in self.states.layers:
                layer.move(places, length)
        for layer in self.states.layers:  # one by one: a pass that failed has reached some of them
            layer.truncate(length + len(path))


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
