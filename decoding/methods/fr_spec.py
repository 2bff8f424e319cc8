"""`fr-spec`: frequency-ranked speculative sampling (Zhao et al., 2025, arXiv 2502.14856).

`sd` by a draft whose head holds only the most frequent tokens: a step costs less, and the target
verifies over its whole vocabulary, so the text is its own. A draft without such a head is refused.
"""

from __future__ import annotations

from decoding.methods.base import Control, Method
from decoding.methods.exact import ExactRule
from decoding.methods.paces import Lockstep

METHOD = Method(
    name="fr-spec",
    summary="exact, one window at a time, by a draft with a head of frequent tokens (lossless)",
    acceptance=ExactRule(),
    pace=Lockstep(),
    control=Control.FIXED,
    drafter_needs=("ranked_head",),
)
