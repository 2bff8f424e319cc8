"""`amusd`: asynchronous multi-device speculative decoding (McDanel, 2024, arXiv 2410.17375).

Draft and target run all the time. The draft writes one token after the other and never waits; the
target takes all that are pending whenever they continue its text, in one pass, and adds a token of
its own. On a mismatch it waits until the draft has answered.

The published system counts rollback requests and answers in shared memory. Here a window names the
text that it follows, so the first one that follows the corrected text is the answer. Where else the
two differ: docs/method.md, AMUSD.
"""

from __future__ import annotations

from decoding.methods.base import Control, Method
from decoding.methods.exact import ExactRule
from decoding.methods.paces import Continuous

METHOD = Method(
    name="amusd",
    summary="exact, the draft never stops and the target takes all that is pending (lossless)",
    acceptance=ExactRule(),
    pace=Continuous(),
    control=Control.FIXED,
)
