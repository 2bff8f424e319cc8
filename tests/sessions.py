"""Messages of a session with everyday values, for tests that change a field or two."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from bus.protocol.arrays import pack_tokens
from bus.protocol.bounds import SessionCoupling
from bus.protocol.messages import DraftWindow, OpenSession

OPENING = OpenSession(
    session="s1",
    client="c1",
    edge="edge-1",
    incarnation=1,
    epoch=0,
    next_seq=0,
    method="sd",
    prompt=pack_tokens((1, 2, 3)),
    committed=b"",
    seed=5,
    max_new_tokens=20,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    coupling=SessionCoupling.RESIDUAL,
    tokenizer_digest="digest",
)


def drafted_window(start: int, tokens: tuple[int, ...], **changes: Any) -> DraftWindow:
    """Each token with probability 3/4; with 1/4 token 0, or 1 beside a drafted 0."""
    plain = DraftWindow(
        session="s1",
        incarnation=1,
        epoch=0,
        seq=0,
        start=start,
        tokens=pack_tokens(tokens),
        q_ids=pack_tokens([i for token in tokens for i in (token, 0 if token else 1)]),
        q_probs=np.tile(np.array([0.75, 0.25], "<f2"), len(tokens)).tobytes(),
        threshold=0.1,
        control_version=0,
        draft_ms=6.0,
        edge_ms=26.0,
        rework_ms=3.0,
        rtt_ms=9.0,
        awaits=True,
    )
    return msgspec.structs.replace(plain, **changes)
