"""Which policy a session is under, by its method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from controller.settings import ControllerSettings
from decoding import methods
from decoding.control import FixedPolicy, Policy
from decoding.credit import CreditLaw, CreditPolicy, ExplorePolicy
from decoding.methods.base import Control

Policies = Callable[[str], Policy]
"""Method name → policy."""

EXPLORED_THRESHOLDS = (-1.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
"""What calibration tries, in nats [ours]: T_min … T_max, and exact verification, by which quality
is judged."""
EXPLORED_WINDOWS = (1, 2, 3, 4, 6, 8)
_MOST_NAMES = 256


def policies(settings: ControllerSettings, law: CreditLaw) -> Policies:
    """The policy of each method, with the threshold that its name may carry.

    A method that is not known here, of a worker with other code, has the fixed policy.
    """

    @lru_cache(_MOST_NAMES)
    def policy(name: str) -> Policy:
        method = methods.find(name)
        if method is None or method.control is Control.FIXED:
            given = None if method is None else method.threshold
            return FixedPolicy(settings.threshold if given is None else given, settings.window)
        if method.control is Control.EXPLORE:
            return ExplorePolicy(law, EXPLORED_THRESHOLDS, EXPLORED_WINDOWS)
        own = law if method.threshold is None else replace(law, base=method.threshold)
        if method.control is Control.LATEST:
            own = replace(own, memory=1, smoothing=1.0)
        return CreditPolicy(own)

    return policy


def law_of(settings: ControllerSettings) -> CreditLaw:
    """The law with the numbers that settings give."""
    return CreditLaw(
        base=settings.base_threshold,
        least=settings.least_threshold,
        most=settings.greatest_threshold,
        conservative=settings.least_threshold,
        gain=settings.credit_gain,
        smoothing=settings.credit_smoothing,
        memory=settings.credit_memory,
        band=settings.threshold_band,
        hold=settings.threshold_hold,
    )
