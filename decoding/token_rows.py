"""Distributions of committed tokens, as feedback carries them where a session asks for them.

A session whose text is another one's drafts (`decoding.cascade`) has them where the reader's method
compares distributions: then the model that wrote the text is the draft, and its rows are q.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from bus.protocol.arrays import PROB_DTYPE, TOKEN_DTYPE, Float16Array, Int32Array
from bus.protocol.messages import Feedback, TokenRows
from decoding.engine import TargetRow
from decoding.sampling import canonical


class TokenRow(Struct, frozen=True):
    """One token's, as bytes, so that states that hold them can be compared.

    Attributes:
        q_ids: int32[K]. q_probs: float16[K], canonical.
    """

    q_ids: bytes
    q_probs: bytes

    def arrays(self) -> tuple[Int32Array, Float16Array]:
        """int32[K] and float16[K], read-only views."""
        return np.frombuffer(self.q_ids, TOKEN_DTYPE), np.frombuffer(self.q_probs, PROB_DTYPE)


Rows = tuple[TokenRow | None, ...]
"""Of each token of a text; None where it is not known."""


def packed(rows: Sequence[TargetRow]) -> TokenRows | None:
    """The most probable tokens of each row, as they travel; None where a pass was not asked."""
    tops = [row.top for row in rows]
    if not tops or any(top is None for top in tops):
        return None
    pairs = [canonical(ids, np.exp(logs).astype(PROB_DTYPE)) for ids, logs in filter(None, tops)]
    return TokenRows(
        b"".join(ids.astype(TOKEN_DTYPE, copy=False).tobytes() for ids, _ in pairs),
        b"".join(probs.tobytes() for _, probs in pairs),
    )


def carried(feedback: Feedback, start: int, count: int) -> Rows:
    """Of `count` tokens from absolute position `start` on, those that a feedback carries."""
    if feedback.rows is None:
        return (None,) * count
    first, num_tokens = start - feedback.start, len(feedback.token_ids)
    ids = np.frombuffer(feedback.rows.q_ids, TOKEN_DTYPE).reshape(num_tokens, -1)
    probs = np.frombuffer(feedback.rows.q_probs, PROB_DTYPE).reshape(num_tokens, -1)
    return tuple(
        TokenRow(ids[i].tobytes(), probs[i].tobytes()) for i in range(first, first + count)
    )
