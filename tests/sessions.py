"""Messages of a session with everyday values, for tests that change a field or two."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from bus.protocol.arrays import pack_tokens
from bus.protocol.bounds import SessionCoupling
from bus.protocol.messages import DraftRows, DraftWindow, OpenSession, Outcome, WindowReport
from decoding.prefix_hash import chain, prompt_hash

PROMPT = (1, 2, 3)
OPENING = OpenSession(
    session="s1",
    client="c1",
    edge="edge-1",
    incarnation=1,
    method="sd",
    prompt=pack_tokens(PROMPT),
    committed=b"",
    seed=5,
    max_new_tokens=20,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    coupling=SessionCoupling.GUMBEL,
    tokenizer_digest="digest",
)
REPORT = WindowReport(
    session="s1",
    incarnation=1,
    number=1,
    edge="edge-1",
    client="c1",
    method="sd",
    outcome=Outcome.PARTIAL,
    num_drafted=2,
    num_accepted=1,
    num_own=1,
    threshold=0.25,
    expected_accepted=1.5,
    mean_jsd=0.25,
    edge_ms=1.0,
    cloud_ms=2.0,
    rework_ms=3.0,
    verify_ms=10.0,
    queue_ms=0.5,
    energy_j=None,
    num_scored=1,
    log_likelihood=-0.5,
    num_greedy=1,
    regret=0.25,
)


def text_hash(text: tuple[int, ...], num_prompt: int = len(PROMPT)) -> bytes:
    """Of a whole text, as a window drafted after it names it."""
    return [*chain(prompt_hash(text[:num_prompt]), text[num_prompt:])][-1]


def drafted_window(
    text: tuple[int, ...], tokens: tuple[int, ...], num_prompt: int = len(PROMPT), **changes: Any
) -> DraftWindow:
    """The session's first window, drafted after `text`; ids alone."""
    plain = DraftWindow(
        handle=1,
        number=1,
        acknowledged=num_prompt,
        start=len(text),
        follows=text_hash(text, num_prompt),
        tokens=pack_tokens(tokens),
    )
    return msgspec.structs.replace(plain, **changes)


def drafted_rows(tokens: tuple[int, ...], **changes: Any) -> DraftRows:
    """Each token with probability 3/4; with 1/4 token 0, or 1 beside a drafted 0."""
    plain = DraftRows(
        q_ids=pack_tokens([i for token in tokens for i in (token, 0 if token else 1)]),
        q_probs=np.tile(np.array([0.75, 0.25], "<f2"), len(tokens)).tobytes(),
        threshold=0.1,
        control_version=0,
        edge_ms=26.0,
        rework_ms=3.0,
    )
    return msgspec.structs.replace(plain, **changes)
