"""Who drafts, as settings spell it. Does not load torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from decoding.engine import Drafter


class DrafterKind(StrEnum):
    """Who writes ahead."""

    MODEL = "model"
    LOOKUP = "lookup"
    LOOKUP_MODEL = "lookup+model"
    NONE = "none"


def drafter_of(kind: DrafterKind, model: Drafter[Any]) -> Drafter[Any]:
    """The drafter of a kind; `model` gives vocabulary and context even where lookup is alone, and
    is none itself where nobody drafts."""
    from engines.lookup import LookupDrafter  # noqa: PLC0415 - settings need the names alone
    from engines.row import DrafterRow  # noqa: PLC0415

    match kind:
        case DrafterKind.MODEL | DrafterKind.NONE:
            return model
        case DrafterKind.LOOKUP:
            return LookupDrafter(model.vocab_size, model.context_length, always=True)
        case DrafterKind.LOOKUP_MODEL:
            return DrafterRow(LookupDrafter(model.vocab_size, model.context_length), model)
