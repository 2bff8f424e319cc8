"""The target model of a cloud or middle worker, from its settings."""

from __future__ import annotations

from bus.store import Role
from cloud_worker.settings import CloudSettings
from engines.catalog.speculators import chosen_speculators
from engines.padding import LeastTimes, Padding
from engines.torch.narrow_target import load_as_target
from engines.torch.prefixes import PrefixCache
from engines.torch.target import TargetModel


def load_model(settings: CloudSettings) -> TargetModel:
    """The target, with its speculators. Call it on the model thread.

    Raises:
        ConfigurationError: it cannot be loaded as set.
    """
    load = load_as_target if settings.role is Role.MIDDLE else TargetModel.load
    model = load(settings.target, settings.dtype, settings.device)
    # Shipped speculators only where the target can have any.
    wanted = settings.speculator or model.capabilities.hidden_states
    if settings.role is Role.CLOUD and wanted:
        model.equip(chosen_speculators(settings.speculator, settings.target))
    model.padding = Padding(LeastTimes.parse(settings.least_pass_ms), settings.pass_counts)
    model.prefixes = PrefixCache(settings.prefix_cache_mb)
    return model
