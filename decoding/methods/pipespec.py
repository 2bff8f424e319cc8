"""`pipespec`, `pipespec-2`: a chain of models, each verifying what the one before it has written
and writing on meanwhile (PipeSpec, McDanel et al., 2025, arXiv 2505.01572).

`pipespec-2` is the chain of two: the edge's drafter and the target. `pipespec` has a middle model
between: lookup drafts for it, and its text are the target's drafts (`decoding.cascade`).
"""

from __future__ import annotations

from decoding.methods.base import Control, Flow, Method, PaceView
from decoding.methods.exact import ExactRule

BUFFER = 100
"""Most tokens of one stage that wait for the next one, as published."""
MESSAGE = 4
"""Most tokens a window: a stage hands over what it has, so that the next begins early [ours]."""


class Buffered:
    """Every stage drafts until its buffer is full; predictions are not used."""

    name = "buffered"
    forecasts = False

    def flow(self, view: PaceView) -> Flow:  # noqa: ARG002 - nothing decides but the buffer
        return Flow(message=MESSAGE, budget=BUFFER, awaits=False)


TWO = Method(
    name="pipespec-2",
    summary="exact; draft and target both write all the time, a buffer between (lossless)",
    acceptance=ExactRule(),
    pace=Buffered(),
    control=Control.FIXED,
    runs_on=True,
)
METHOD = Method(
    name="pipespec",
    summary="exact; as pipespec-2 with a middle worker's model between (lossless)",
    acceptance=ExactRule(),
    pace=Buffered(),
    control=Control.FIXED,
    runs_on=True,
    inner=TWO.name,
)
METHODS = (METHOD, TWO)
