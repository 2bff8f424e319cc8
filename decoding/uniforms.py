"""Uniform random numbers addressed by (seed, absolute position, purpose), never by call order.

Counter-based generator Philox 4x64 (Salmon et al., 2011): the key is (seed, purpose), the counter
(0, position, 0, 0). The lowest word numbers the blocks of one position, so that no two positions
share numbers however many are drawn at each. Whoever asks for the same address gets the same
number, so a resent window, a restarted worker or another window split cannot change the text.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random import Philox

from bus.protocol.arrays import Float64Array

UInt64Array = npt.NDArray[np.uint64]

WORDS = 4
"""Words of a Philox block."""
LARGEST = 1.0 - 2.0**-53
"""The largest uniform: the largest float64 below 1."""


class Purpose(IntEnum):
    """What numbers decide at their position; the four are independent.

    `NOISE` is that of `decoding.coupling`, one number for each token id. The others belong to
    residual sampling; an oracle draft errs by `DRAFT`.
    """

    NOISE = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


def uniform(seed: int, position: int, purpose: Purpose) -> float:
    """The uniform in (0, 1) at this address, with 53 random bits.

    Args:
        seed: the request's seed, 0 ≤ seed < 2**63.
        position: absolute position of the token the number decides about.
        purpose: which of the decisions at that position.
    """
    return float(opened(words(seed, position, purpose, 0, 1))[0])


def words(seed: int, position: int, purpose: Purpose, first_block: int, count: int) -> UInt64Array:
    """uint64[count] of Philox, from block `first_block` on; a block has `WORDS` of them."""
    counter = [first_block, position, 0, 0]
    drawn: UInt64Array = Philox(key=[seed, int(purpose)], counter=counter).random_raw(count)
    return drawn


def words_at(
    seed: int, position: int, purpose: Purpose, indices: npt.NDArray[np.integer]
) -> UInt64Array:
    """uint64[n], single ones of these words, at indices, int[n]: one generator that is set back to
    each block, which takes a fifth of the time that a new one does."""
    generator = Philox(key=[seed, int(purpose)], counter=[0, position, 0, 0])
    state: Any = generator.state
    found = np.empty(indices.size, np.uint64)
    for place, (block, word) in enumerate(zip(*np.divmod(indices, WORDS), strict=True)):
        state["state"]["counter"][0] = block
        generator.state = state
        found[place] = generator.random_raw(WORDS)[word]
    return found


def opened(raw: UInt64Array) -> Float64Array:
    """Uniforms from the upper 53 bits of words, in (0, 1): in the middle of their intervals where
    float64 can tell, never 0 and never 1."""
    uniforms: Float64Array = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.minimum(uniforms, LARGEST)
