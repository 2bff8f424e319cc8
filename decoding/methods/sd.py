"""`sd`: speculative decoding as published, exact, in lockstep (Leviathan et al., 2023)."""

from __future__ import annotations

from decoding.methods.base import Control, Method
from decoding.methods.exact import ExactRule
from decoding.methods.paces import Lockstep

METHOD = Method(
    name="sd",
    summary="exact speculative decoding, one window at a time (lossless)",
    acceptance=ExactRule(),
    pace=Lockstep(),
    control=Control.FIXED,
)
