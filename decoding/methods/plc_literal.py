"""`plc-literal`: as `plc`, with the paper's budget to the letter, to compare."""

from __future__ import annotations

from decoding.methods.base import Control, Method
from decoding.methods.exact import ExactRule
from decoding.methods.paces import AheadLiterally

METHOD = Method(
    name="plc-literal",
    summary="exact, drafting on with a budget that starts at the window, to compare (lossless)",
    acceptance=ExactRule(),
    pace=AheadLiterally(),
    control=Control.FIXED,
)
