"""`plc`: exact verification at the pace of progressive lookahead concurrency."""

from __future__ import annotations

from decoding.methods.base import Control, Method
from decoding.methods.exact import ExactRule
from decoding.methods.paces import Ahead

METHOD = Method(
    name="plc",
    summary="exact speculative decoding, drafting on while windows are verified (lossless)",
    acceptance=ExactRule(),
    pace=Ahead(),
    control=Control.FIXED,
)
