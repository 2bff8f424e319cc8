"""The target's features, as feedback carries them where a session asks for them.

A draft at the edge that reads them (EAGLE-3) gets those of each position with the token that the
position's row has chosen, n tokens at a time:

    tokens            x_s   …  x_{s+n−1}          `Feedback.start` is s
    features of       s−1   …  s+n−2
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bus.protocol.arrays import PROB_DTYPE, Float16Array
from bus.protocol.attachments import NUM_LEVELS, TokenFeatures
from bus.protocol.messages import Feedback
from decoding.engine import TargetRow

_LARGEST = 127


def packed(rows: Sequence[TargetRow]) -> TokenFeatures | None:
    """The features of each row, as they travel; None where a pass was not asked.

    A level is rounded to multiples of its greatest magnitude / 127.
    """
    known = [row.features for row in rows if row.features is not None]
    if not known or len(known) < len(rows):
        return None
    levels = np.stack(known).astype(np.float32)
    scales = (np.abs(levels).max(axis=2) / _LARGEST).astype(PROB_DTYPE)
    steps = np.where(scales > 0, scales, 1).astype(np.float32)[..., None]
    rounded = np.clip(np.rint(levels / steps), -_LARGEST, _LARGEST).astype(np.int8)
    return TokenFeatures(rounded.tobytes(), scales.tobytes())


def unpacked(features: TokenFeatures) -> Float16Array:
    """float16[n, 3, d]."""
    scales = np.frombuffer(features.scales, PROB_DTYPE).reshape(-1, NUM_LEVELS, 1)
    levels = np.frombuffer(features.levels, np.int8).reshape(len(scales), NUM_LEVELS, -1)
    return (levels * scales.astype(np.float32)).astype(np.float16)


def carried(feedback: Feedback, start: int, count: int) -> TokenFeatures | None:
    """What a feedback carries with `count` tokens from absolute position `start` on."""
    given = feedback.features
    if given is None:
        return None
    first, num_tokens = start - feedback.start, len(feedback.token_ids)

    def part(data: bytes) -> bytes:
        size = len(data) // num_tokens
        return data[first * size : (first + count) * size]

    return TokenFeatures(part(given.levels), part(given.scales))
