"""`fsd`, `fsd-plc`: fuzzy speculative decoding (Holsman et al., 2025), a baseline, in two paces."""

from __future__ import annotations

from decoding.methods.base import Control, Method
from decoding.methods.divergence import DivergenceRule
from decoding.methods.paces import Ahead, Lockstep

METHOD = Method(
    name="fsd",
    summary="accepts by divergence alone, one window at a time (lossy)",
    acceptance=DivergenceRule(),
    pace=Lockstep(),
    control=Control.FIXED,
)
AHEAD = Method(
    name="fsd-plc",
    summary="as fsd, drafting on while windows are verified (lossy)",
    acceptance=DivergenceRule(),
    pace=Ahead(),
    control=Control.FIXED,
)
