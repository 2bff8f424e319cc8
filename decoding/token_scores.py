"""Log-probabilities of committed tokens under the target, for users who ask for them.

They are those of the target's temperature-1 distribution, whichever rule has accepted a token and
whoever drafted it, so a lossless answer has the same ones with any draft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from bus.protocol.arrays import SCORE_DTYPE, TOKEN_DTYPE
from bus.protocol.attachments import TokenScores
from bus.protocol.errors import LocalError
from bus.protocol.messages import Feedback
from decoding.engine import TargetRow

LEAST = -1e4
"""In nats: what −∞ becomes, which JSON cannot hold [ours]."""


class TokenScore(Struct, frozen=True):
    """One token's, as bytes, so that states that hold them can be compared.

    Attributes:
        own: float32[1], of the token itself, in nats. top_ids: int32[K] and top: float32[K], the
            most probable tokens in its place, falling.
    """

    own: bytes
    top_ids: bytes
    top: bytes

    @property
    def logprob(self) -> float:
        """Of the token itself."""
        return float(np.frombuffer(self.own, SCORE_DTYPE)[0])

    @property
    def others(self) -> tuple[tuple[int, float], ...]:
        """The most probable tokens, each with its log-probability."""
        ids, scores = np.frombuffer(self.top_ids, TOKEN_DTYPE), np.frombuffer(self.top, SCORE_DTYPE)
        return tuple(zip(ids.tolist(), scores.tolist(), strict=True))


def score(row: TargetRow, token: int, num_top: int) -> TokenScore:
    """Of `token` by the row it was chosen from.

    Args:
        num_top: K, or less where the row has fewer.

    Raises:
        LocalError: the row was not asked for the token.
    """
    if row.top is None:
        raise LocalError("log-probabilities are wanted of a row that was not asked for any")
    ids, logs = row.top
    known = dict(zip(ids.tolist(), logs.tolist(), strict=True)) | dict(row.scored)
    if token not in known:
        raise LocalError(f"the row was not asked for token {token}")
    return TokenScore(
        _packed([known[token]]),
        ids[:num_top].astype(TOKEN_DTYPE, copy=False).tobytes(),
        _packed(logs[:num_top].tolist()),
    )


def _packed(logs: Sequence[float]) -> bytes:
    finite = [max(log, LEAST) if not math.isnan(log) else LEAST for log in logs]
    return bytes(np.minimum(np.array(finite), 0.0).astype(SCORE_DTYPE).tobytes())


def scored(
    rows: Sequence[TargetRow], tokens: Sequence[int], num_top: int
) -> tuple[TokenScore, ...]:
    """Of tokens by their rows.

    Raises:
        LocalError: a row is missing, or was not asked.
    """
    if len(rows) != len(tokens):
        raise LocalError(f"{len(tokens)} tokens were chosen from {len(rows)} rows")
    return tuple(score(row, token, num_top) for row, token in zip(rows, tokens, strict=True))


def joined(scores: Sequence[TokenScore]) -> TokenScores:
    """As they travel."""
    return TokenScores(
        b"".join(one.own for one in scores),
        b"".join(one.top_ids for one in scores),
        b"".join(one.top for one in scores),
    )


def parted(scores: TokenScores) -> tuple[TokenScore, ...]:
    """One by one."""
    count = scores.num_tokens
    if not count:
        return ()
    parts = (scores.own, scores.top_ids, scores.top)
    sizes = [len(data) // count for data in parts]
    return tuple(
        TokenScore(*(data[i * n : (i + 1) * n] for data, n in zip(parts, sizes, strict=True)))
        for i in range(count)
    )


def carried(feedback: Feedback, start: int, count: int) -> tuple[TokenScore, ...]:
    """Of `count` tokens from absolute position `start` on, those that a feedback carries; none
    where it carries none."""
    if feedback.scores is None:
        return ()
    first = start - feedback.start
    return parted(feedback.scores)[first : first + count]
