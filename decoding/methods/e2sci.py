"""`e2sci`: elastic acceptance under credit inertia at the pace of PLC; its ablations; and
`e2sci+HOST`, which lays it over another method.

Each ablation lacks one thing: `-no-plc` drafts in lockstep, `-no-threshold` verifies exactly,
`-no-history` knows the last window alone, `-fixed` keeps one threshold, which shows what credit
itself is worth.
"""

from __future__ import annotations

from dataclasses import replace

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
    variant_of=METHOD.name,
)
NO_THRESHOLD = Method(
    name="e2sci-no-threshold",
    summary="e2sci with exact verification (lossless)",
    acceptance=ExactRule(),
    pace=Ahead(),
    control=Control.CREDIT,
    runs_on=True,
    variant_of=METHOD.name,
)
NO_HISTORY = Method(
    name="e2sci-no-history",
    summary="e2sci by the last window alone (lossy)",
    acceptance=ElasticRule(),
    pace=Ahead(),
    control=Control.LATEST,
    runs_on=True,
    variant_of=METHOD.name,
)
FIXED = Method(
    name="e2sci-fixed",
    summary="e2sci with one threshold throughout (lossy)",
    acceptance=ElasticRule(),
    pace=Ahead(),
    control=Control.FIXED,
    runs_on=True,
    variant_of=METHOD.name,
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


def over(host: Method) -> Method:
    """`e2sci+HOST` (docs/method.md, E²-SCI over other methods).

    An exact host accepts by the elastic rule instead, a lossy one by its own; credit moves the
    threshold of either. In lockstep draft and target take turns: such a host has no pace of its
    own and gets E²-SCI's, with a target that runs on. Any other keeps its pace, and its target
    waits or runs on as before.
    """
    paced = METHOD if host.lockstep else host
    rule = "exact or alike" if host.lossless else f"the rule of {host.name}"
    pace = "drafting on" if host.lockstep else f"the pace of {host.name}"
    return replace(
        host,
        name=f"{METHOD.name}+{host.name}",
        summary=f"{rule}, the threshold following recent windows, {pace} (lossy)",
        acceptance=METHOD.acceptance if host.lossless else host.acceptance,
        control=METHOD.control,
        pace=paced.pace,
        runs_on=paced.runs_on,
    )


def why_not_over(host: Method) -> str:
    """Why `e2sci+HOST` makes no sense for a method; empty where it does."""
    if host.variant_of:
        return f"{host.name} is {host.variant_of} with one part changed, to compare"
    if host.steps is not None:
        return f"{host.name} judges steps, whose text would depend on timing if tokens were judged"
    if host.control is not Control.FIXED:
        return f"the threshold of {host.name} moves already"
    return ""
