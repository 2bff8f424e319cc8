"""What engines count anyway, as metrics."""

from __future__ import annotations

from bus.runtime.metrics import Metrics
from engines.energy import PowerGauge
from engines.torch.prefixes import PrefixCache

__all__ = ["register_energy", "register_prefixes"]


def register_prefixes(metrics: Metrics, prefixes: PrefixCache) -> None:
    """Of a model's prefix cache."""
    metrics.counter(
        "prefix_cache_queries", "Tokens of prompts that were looked for in the prefix cache.",
        lambda: prefixes.num_queried,
    )  # fmt: skip
    metrics.counter(
        "prefix_cache_hits", "Tokens of prompts that came from the prefix cache.",
        lambda: prefixes.num_tokens,
    )  # fmt: skip


def register_energy(metrics: Metrics, gauge: PowerGauge) -> None:
    """Of a model's passes."""
    metrics.counter(
        "energy_joules", "Energy of the model's passes in joules, measured or modelled.",
        lambda: {gauge.source: gauge.total_joules}, "source",
    )  # fmt: skip
