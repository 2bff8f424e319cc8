"""`medusa`, `medusa-typical`: heads beside the target propose a tree of tokens from its last hidden
state (Cai et al., 2024, arXiv 2401.10774), with exact and with typical acceptance."""

from __future__ import annotations

from dataclasses import replace

from decoding.methods.base import Control, Method
from decoding.methods.exact import ExactRule
from decoding.methods.paces import Resting
from decoding.methods.typical import TypicalRule

METHOD = Method(
    name="medusa",
    summary="exact; heads at the target propose trees of tokens, the edge reads (lossless)",
    acceptance=ExactRule(),
    pace=Resting(),
    control=Control.FIXED,
    needs=("trees",),
    runs_on=True,
    speculator="medusa",
)
TYPICAL = replace(
    METHOD,
    name="medusa-typical",
    summary="as medusa, accepting tokens that are likely enough, the longest path (lossy)",
    acceptance=TypicalRule(),
    variant_of=METHOD.name,
)
METHODS = (METHOD, TYPICAL)
