"""`e2sci`: elastic acceptance under credit inertia at the pace of PLC, and its ablations.

Each ablation lacks one thing: `-no-plc` drafts in lockstep, `-no-threshold` verifies exactly,
`-no-history` knows the last window alone, `-fixed` keeps one threshold, which shows what credit
itself is worth.
"""

from __future__ import annotations

from decoding.methods.base import Control, Method
from decoding.methods.divergence import ElasticRule
from decoding.methods.exact import ExactRule
from decoding.methods.paces import Ahead, Lockstep

METHOD = Method(
    name="e2sci",
    summary="exact or alike, the threshold following recent windows, drafting on (lossy)",
    acceptance=ElasticRule(),
    pace=Ahead(),
    control=Control.CREDIT,
    runs_on=True,
)
NO_PLC = Method(
    name="e2sci-no-plc",
    summary="e2sci, one window at a time (lossy)",
    acceptance=ElasticRule(),
    pace=Lockstep(),
    control=Control.CREDIT,
)
NO_THRESHOLD = Method(
    name="e2sci-no-threshold",
    summary="e2sci with exact verification (lossless)",
    acceptance=ExactRule(),
    pace=Ahead(),
    control=Control.CREDIT,
    runs_on=True,
)
NO_HISTORY = Method(
    name="e2sci-no-history",
    summary="e2sci by the last window alone (lossy)",
    acceptance=ElasticRule(),
    pace=Ahead(),
    control=Control.LATEST,
    runs_on=True,
)
FIXED = Method(
    name="e2sci-fixed",
    summary="e2sci with one threshold throughout (lossy)",
    acceptance=ElasticRule(),
    pace=Ahead(),
    control=Control.FIXED,
    runs_on=True,
)
EXPLORE = Method(
    name="e2sci-explore",
    summary="to calibrate: threshold and window drawn anew after each window (lossy)",
    acceptance=ElasticRule(),
    pace=Lockstep(),
    control=Control.EXPLORE,
)
METHODS = (METHOD, NO_PLC, NO_THRESHOLD, NO_HISTORY, FIXED, EXPLORE)
ABLATIONS = (NO_PLC, NO_THRESHOLD, NO_HISTORY, FIXED)
