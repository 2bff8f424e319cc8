"""`eagle3-edge`: the layer of EAGLE-3 drafts at the edge, a chain of tokens; the target's features
of what has been committed come with the feedback.

After tokens whose feedback has not come yet the layer goes on with its own states, as it does
within a chain. So draft and target do not wait for each other.
"""

from __future__ import annotations

from decoding.methods.base import Control, Method
from decoding.methods.exact import ExactRule
from decoding.methods.paces import Ahead

METHOD = Method(
    name="eagle3-edge",
    summary="exact; the layer of eagle3 drafts at the edge, feedback brings features (lossless)",
    acceptance=ExactRule(),
    pace=Ahead(),
    control=Control.FIXED,
    needs=("hidden_states",),
    drafter_needs=("features",),
    runs_on=True,
)
