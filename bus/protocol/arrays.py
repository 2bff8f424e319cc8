"""Arrays as they travel: little-endian bytes, one dtype for each purpose.

Token ids are int32, probabilities float16, log-probabilities float32. This module knows byte order
and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

TOKEN_DTYPE = np.dtype("<i4")
PROB_DTYPE = np.dtype("<f2")
SCORE_DTYPE = np.dtype("<f4")

Int32Array = npt.NDArray[np.int32]
Float16Array = npt.NDArray[np.float16]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids → int32 little-endian bytes."""
    ids = tuple(tokens)
    return struct.pack(f"<{len(ids)}i", *ids)


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """int32 little-endian bytes → token ids as Python ints."""
    return struct.unpack(f"<{len(data) // 4}i", data)
