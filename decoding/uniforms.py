"""Uniform random numbers addressed by (seed, absolute position, purpose), never by call order.

Counter-based generator Philox 4x64 (Salmon et al., 2011): the key is (seed, purpose), the counter
is the position. Whoever asks for the same address gets the same number, so a resent window, a
restarted worker or another window split cannot change the text.
"""

from __future__ import annotations

from enum import IntEnum

from numpy.random import Philox


class Purpose(IntEnum):
    """What a uniform decides at its position; the four are independent."""

    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    TARGET = 4


def uniform(seed: int, position: int, purpose: Purpose) -> float:
    """The uniform in [0, 1) at this address, with 53 random bits.

    Args:
        seed: the request's seed, 0 ≤ seed < 2**63.
        position: absolute position of the token the number decides about.
        purpose: which of the decisions at that position.
    """
    generator = Philox(key=[seed, int(purpose)], counter=[position, 0, 0, 0])
    return float(int(generator.random_raw()) >> 11) * 2.0**-53
