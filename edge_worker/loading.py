"""What an edge worker drafts with, from its settings."""

from __future__ import annotations

from typing import Any

from decoding.engine import Drafter
from edge_worker.settings import EdgeSettings
from edge_worker.specs import EdgeModel
from engines.catalog.sources import split_speculator
from engines.kinds import DrafterKind, drafter_of
from engines.padding import LeastTimes, Padding
from engines.torch.drafter import ModelDrafter
from engines.torch.oracle import OracleDraft
from engines.torch.prefixes import PrefixCache
from engines.torch.speculators.drafter import Eagle3Drafter
from engines.torch.thin import NoDrafter


def load_model(settings: EdgeSettings) -> EdgeModel:
    """The draft model, or what knows the tokenizer alone where none drafts. Call it on the model
    thread.

    Raises:
        ConfigurationError: it cannot be loaded as set.
    """
    spec, dtype, device = settings.draft, settings.dtype, settings.device
    if settings.drafter is DrafterKind.NONE and settings.oracle is None:
        return NoDrafter.load(spec)
    model: ModelDrafter | Eagle3Drafter
    if split_speculator(spec) is not None and settings.oracle is None:
        model = Eagle3Drafter.load(spec, settings.num_sparse)
    elif settings.oracle is None:
        model = ModelDrafter.load(spec, dtype, device, settings.num_sparse)
    else:
        model = OracleDraft.load_oracle(
            spec, dtype, device, settings.num_sparse, settings.oracle, settings.oracle_error_rate
        )
    model.padding = Padding(LeastTimes.parse(f"{settings.least_step_ms:g}"), settings.step_counts)
    model.prefixes = PrefixCache(settings.prefix_cache_mb)
    return model


def drafter_for(settings: EdgeSettings, model: EdgeModel) -> Drafter[Any]:
    """The drafter as set; an oracle drafts alone."""
    kind = DrafterKind.MODEL if settings.oracle else settings.drafter
    return drafter_of(kind, model)
