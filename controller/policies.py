"""Which policy a session is under: by its method, and by whether the calibration holds here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from bus.protocol.errors import ConfigurationError
from bus.store import Role, WorkerRecord
from controller.calibration import Calibration, load_calibration
from controller.settings import DEFAULT, UNCALIBRATED, ControllerSettings, CreditSignal
from decoding import methods
from decoding.control import FixedPolicy, Policy
from decoding.credit import CreditLaw, CreditPolicy, ExplorePolicy
from decoding.methods.base import Control

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "calibrations" / "default.safetensors"
"""Of the default pair (docs/credit.md)."""
EXPLORED_THRESHOLDS = (-1.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
"""What calibration tries, in nats [ours]: T_min … T_max, and exact verification, by which quality
is judged."""
EXPLORED_WINDOWS = (1, 2, 3, 4, 6, 8)
_MOST_NAMES = 256


class Policies:
    """The policy of each method, with the threshold that its name may carry.

    Where no calibration can be loaded, or the workers are another pair than it was made for,
    credit does not move the threshold: the conservative one holds.
    """

    def __init__(self, settings: ControllerSettings) -> None:
        self._calibration = _load(settings.calibration)
        self._problem = ""
        self._settings, self._law = settings, self._calibrated(settings)
        self._conservative = self._calibration is None and settings.calibration != UNCALIBRATED
        self._policy = lru_cache(_MOST_NAMES)(self._find)

    def __call__(self, method: str) -> Policy:
        """Of a method by name; one that is not known here has the fixed policy."""
        return self._policy(method)

    def retune(self, settings: ControllerSettings) -> None:
        """Other numbers from now on; sessions keep their credit. The calibration stays."""
        self._settings, self._law = settings, self._calibrated(settings)
        self._policy.cache_clear()

    def _calibrated(self, settings: ControllerSettings) -> CreditLaw:
        law = law_of(settings)
        return law if self._calibration is None else self._calibration.law(law)

    def check(self, workers: Sequence[WorkerRecord]) -> None:
        """Look whether the calibration holds for these workers; say so when that changes."""
        if self._calibration is None:
            return
        problem = _problem_of(self._calibration, workers)
        if problem == self._problem:
            return
        self._problem, self._conservative = problem, bool(problem)
        self._policy.cache_clear()
        if problem:
            log.warning(
                "the calibration does not hold here: %s; the threshold of %g holds. Calibrate with "
                "`e2sci calibrate`", problem, self._settings.least_threshold,
            )  # fmt: skip
        else:
            log.info("the calibration holds for the workers here")

    def _find(self, name: str) -> Policy:
        settings = self._settings
        method = methods.find(name)
        if method is None or method.control is Control.FIXED:
            given = None if method is None else method.threshold
            return FixedPolicy(settings.threshold if given is None else given, settings.window)
        if method.control is Control.EXPLORE:
            return ExplorePolicy(law_of(settings), EXPLORED_THRESHOLDS, EXPLORED_WINDOWS)
        if self._conservative:
            return FixedPolicy(settings.least_threshold, settings.window)
        law = self._law if method.threshold is None else replace(self._law, base=method.threshold)
        if method.control is Control.LATEST:
            law = replace(law, memory=1, smoothing=1.0)
        return CreditPolicy(law, settings.credit_signal is CreditSignal.REALISED)


def law_of(settings: ControllerSettings) -> CreditLaw:
    """The law with the numbers that settings give, not calibrated."""
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


def _load(name: str) -> Calibration | None:
    if name == UNCALIBRATED:
        return None
    path = SHIPPED if name == DEFAULT else Path(name)
    try:
        return load_calibration(path)
    except ConfigurationError as error:
        log.warning("%s; methods under credit keep the conservative threshold", error)
        return None


def _problem_of(calibration: Calibration, workers: Sequence[WorkerRecord]) -> str:
    targets = [worker for worker in workers if worker.role is Role.CLOUD]
    drafts = [worker for worker in workers if worker.role is Role.EDGE]
    for target in targets:
        for draft in drafts:
            problem = calibration.mismatch(target.model, draft.model, target.tokenizer_digest)
            if problem is not None:
                return problem
    return ""
