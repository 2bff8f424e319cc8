"""`lookahead`, `lookahead-similar`: Lookahead Reasoning (Fu et al., 2025, arXiv 2506.19830), whole
steps drafted ahead, with two judges of them.

The draft writes up to four steps ahead (`decoding.steps`); the target writes its own version of
each, several at once, with the drafted version as its draft: token by token by the exact rule, and
by itself from where the two part.
"""

from __future__ import annotations

from dataclasses import replace

from decoding.judges import SameText, Similar
from decoding.methods.base import Control, Method, Steps
from decoding.methods.exact import ExactRule
from decoding.methods.paces import Given

METHOD = Method(
    name="lookahead",
    summary="drafts whole steps, accepts those that read as the target's own (lossy)",
    acceptance=ExactRule(),
    pace=Given(),
    control=Control.FIXED,
    runs_on=True,
    steps=Steps(SameText()),
)
SIMILAR = replace(
    METHOD,
    name="lookahead-similar",
    summary="as lookahead, accepting steps that are 95 % alike, with the same numbers (lossy)",
    steps=Steps(Similar()),
    variant_of=METHOD.name,
)
