"""`auto`: exact; it drafts where that is predicted to be faster than the target alone. `auto-chain`
does without rescue branches, to compare."""

from __future__ import annotations

from dataclasses import replace

from decoding.methods.base import Control, Method
from decoding.methods.exact import ExactRule
from decoding.methods.paces import WherePaying

METHOD = Method(
    name="auto",
    summary="exact; the target never waits, drafts where that pays (lossless)",
    acceptance=ExactRule(),
    pace=WherePaying(),
    control=Control.FIXED,
    runs_on=True,
)
CHAIN = replace(
    METHOD,
    name="auto-chain",
    summary="as auto without branches after second choices, to compare (lossless)",
    pace=WherePaying(rescues=False),
    variant_of=METHOD.name,
)
