"""Events of a session whose text is another one's drafts (`decoding.cascade`).

Its text is a proposal: it turns wherever its reader's does, and grows only so far ahead of it.
"""

from __future__ import annotations

from msgspec.structs import replace

from decoding.common import common_length
from decoding.edge_events import Crop, Rebased
from decoding.edge_state import EdgeState, Step
from decoding.prefix_hash import extended, prompt_hash


def rebased(state: EdgeState, event: Rebased) -> Step:
    """With another text; what was drafted after the old one goes, and of the draft's cache what the
    two texts do not share."""
    tokens = event.tokens
    common = common_length(state.text, tokens)
    rows = state.rows[:common]
    if state.spec.rows:
        rows += (None,) * (len(tokens) - len(rows))
    num_prompt = len(state.spec.prompt)
    text_hash = extended(prompt_hash(tokens[:num_prompt]), tokens[num_prompt:])
    state = replace(
        state, tokens=tokens, text_hash=text_hash, draft_hash=text_hash, drafted=(), doubts=(),
        branches=(), in_flight=(), job=None, silent_at=None, rows=rows,
        num_cached=min(state.num_cached, common, len(tokens) - 1),
    )  # fmt: skip
    return state, (Crop(state.num_cached),)
