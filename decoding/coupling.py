"""The target's own choice at a position, as a function of the seed: Gumbel-max with counted noise.

At temperature 0 the choice is the argmax. Above, with p the distribution after temperature, top-k
and top-p,

    choice = argmax_v  log p_v + g_v          g_v = −log(−log u_v)

which is distributed as p (Gumbel 1954). u_v depends on (seed, position, v) alone, so that whoever
evaluates the same row with the same seed makes the same choice: the target in any pass, a replay,
another engine. Of equals the lowest id wins.

Noise is Philox 4x64 with the position in its second word and the ids counted by the first, so that
no two positions share numbers; 53 bits, never 0 or 1.
"""

from __future__ import annotations

import numpy as np

from bus.protocol.arrays import Float64Array
from decoding.engine import Choice

_MASK = (1 << 64) - 1


def noise(seed: int, position: int, size: int) -> Float64Array:
    """float64[size] uniforms in (0, 1), one for each token id."""
    bits = np.random.Philox(key=seed & _MASK, counter=[0, position, 0, 0]).random_raw(size)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def choose(log_probs: Float64Array, seed: int, position: int) -> Choice:
    """The choice at a position above temperature 0.

    Args:
        log_probs: float64[V], log p up to a constant; −inf for tokens cut off.

    Returns:
        The token, and the lead of its log p + g over the next.
    """
    uniforms = noise(seed, position, log_probs.size)
    # Logarithms only of what can be first or second: most noise that any token has bounds the rest.
    most = _gumbel(uniforms.max())
    first, second = _two_largest(log_probs)
    floor = min(log_probs[v] + _gumbel(uniforms[v]) for v in {first, second})
    (able,) = np.nonzero(log_probs + most >= floor)
    scores = log_probs[able] + _gumbel(uniforms[able])
    best = int(np.argmax(scores))
    rest = np.delete(scores, best)
    gap = float(scores[best] - rest.max()) if rest.size else float("inf")
    return Choice(int(able[best]), gap)


def _gumbel(uniforms: Float64Array) -> Float64Array:
    noisy: Float64Array = -np.log(-np.log(uniforms))
    return noisy


def _two_largest(values: Float64Array) -> tuple[int, int]:
    """Places of the two largest of float64[V]; the same twice where V is 1."""
    first = int(np.argmax(values))
    if values.size == 1:
        return first, first
    rest = values.copy()
    rest[first] = -np.inf
    return first, int(np.argmax(rest))
