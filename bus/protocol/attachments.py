"""What tokens may carry in a message beside their ids: distributions, features, log-probabilities.

Arrays are little-endian bytes, one entry for each of n tokens. This module knows their form, not
what they are for.
"""

from __future__ import annotations

import msgspec
import numpy as np

from bus.protocol.arrays import PROB_DTYPE, SCORE_DTYPE, TOKEN_DTYPE
from bus.protocol.bounds import MAX_LOGPROBS

__all__ = ["MAX_SPARSE", "NUM_LEVELS", "TokenFeatures", "TokenRows", "TokenScores"]

MAX_SPARSE = 1024
"""Most probabilities a draft may send for one token (K)."""
NUM_LEVELS = 3
"""Layers of a target whose residual streams are its features (`TokenFeatures`)."""
_ONE_BITS = 0x3C00
"""The bits of 1.0 in float16."""


class TokenRows(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The distributions that n tokens were chosen from: top K temperature-1 probabilities of each,
    in canonical order, probability falling and then id rising."""

    q_ids: bytes  # i32[n, K], K ≥ 1
    q_probs: bytes  # f16[n, K]

    def check(self, num_tokens: int) -> None:
        """Raises ValueError where they are not rows of so many tokens."""
        per_token, rest = divmod(len(self.q_ids), max(num_tokens, 1) * TOKEN_DTYPE.itemsize)
        if rest or not 1 <= per_token <= MAX_SPARSE:
            raise ValueError(f"q_ids: expected i32[{num_tokens}, K] with 1 ≤ K ≤ {MAX_SPARSE}")
        if len(self.q_probs) != num_tokens * per_token * PROB_DTYPE.itemsize:
            raise ValueError(f"q_probs: expected f16[{num_tokens}, {per_token}]")
        # As unsigned integers float16s of [0, 1] keep their order; NaN and negatives lie above.
        ids = np.frombuffer(self.q_ids, dtype=TOKEN_DTYPE).reshape(num_tokens, -1)
        bits = np.frombuffer(self.q_probs, dtype="<u2").reshape(num_tokens, -1)
        rank = (bits.astype(np.int64) << 32) - ids
        if (rank[:, 1:] >= rank[:, :-1]).any():
            raise ValueError("q_probs: expected probabilities falling, equal ones by rising id")
        if not all(0 < first <= _ONE_BITS for first in bits[:, 0].tolist()):
            raise ValueError("q_probs: a row must begin with a probability in (0, 1]")


class TokenFeatures(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The target's features at the positions whose rows n tokens were chosen from, each one before
    its token: hidden states of three levels, x / √(mean x²), as int8 × the scale of their level."""

    levels: bytes  # i8[n, 3, d], d ≥ 1
    scales: bytes  # f16[n, 3]

    def check(self, num_tokens: int) -> None:
        """Raises ValueError where they are not features of so many tokens."""
        num_levels = num_tokens * NUM_LEVELS
        if not self.levels or not num_levels or len(self.levels) % num_levels:
            raise ValueError(f"levels: expected i8[{num_tokens}, {NUM_LEVELS}, d] with n, d ≥ 1")
        if len(self.scales) != num_levels * PROB_DTYPE.itemsize:
            raise ValueError(f"scales: expected f16[{num_tokens}, {NUM_LEVELS}]")
        scales = np.frombuffer(self.scales, PROB_DTYPE)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise ValueError("scales: expected finite numbers of at least 0")


class TokenScores(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Log-probabilities of n tokens under the target at temperature 1, in nats: each token's own,
    and those of the K most probable tokens in its place, falling."""

    own: bytes  # f32[n]
    top_ids: bytes  # i32[n, K], 0 ≤ K ≤ 20
    top: bytes  # f32[n, K]

    @property
    def num_tokens(self) -> int:
        """n."""
        return len(self.own) // SCORE_DTYPE.itemsize

    def check(self, num_tokens: int) -> None:
        """Raises ValueError where they are not scores of so many tokens."""
        if len(self.own) != num_tokens * SCORE_DTYPE.itemsize:
            raise ValueError(f"own: expected f32[{num_tokens}]")
        width, rest = divmod(len(self.top_ids), max(num_tokens, 1) * TOKEN_DTYPE.itemsize)
        if rest or width > MAX_LOGPROBS:
            raise ValueError(f"top_ids: expected i32[{num_tokens}, K] with K ≤ {MAX_LOGPROBS}")
        if len(self.top) != num_tokens * width * SCORE_DTYPE.itemsize:
            raise ValueError(f"top: expected f32[{num_tokens}, {width}]")
        for scores in (self.own, self.top):
            if not (np.frombuffer(scores, SCORE_DTYPE) <= 0).all():  # nor NaN
                raise ValueError("scores: expected log-probabilities of at most 0")
