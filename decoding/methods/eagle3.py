"""`eagle3`: a small decoder layer beside the target proposes a tree of tokens from three of its
hidden states (EAGLE-3, Li et al., 2025, arXiv 2503.01840)."""

from __future__ import annotations

from decoding.methods.base import Control, Method
from decoding.methods.exact import ExactRule
from decoding.methods.paces import Resting

METHOD = Method(
    name="eagle3",
    summary="exact; a layer at the target proposes trees of tokens, the edge reads (lossless)",
    acceptance=ExactRule(),
    pace=Resting(),
    control=Control.FIXED,
    needs=("trees",),
    runs_on=True,
    speculator="eagle3",
)
