"""Watts of a worker while its model runs: read off the device's counters, else as set.

Counters are those of NVIDIA and AMD graphics cards (NVML, AMD SMI) and of processors (RAPL),
through the package `zeus` (the extra `energy`). They count the whole device, so they hold where the
worker has it to itself. Without counters, or without the package, a set number of watts stands in:
then energy is *modelled*.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MEASURED, MODELLED = "measured", "modelled"
Counter = Callable[[], float]
"""Joules that a device has taken so far."""

_log = logging.getLogger(__name__)


class PowerGauge:
    """Tells the energy of passes from their time.

    Args:
        busy_w: watts where nothing is measured.
        counter: what measures; None where nothing does.

    Attributes:
        source: `measured` or `modelled`.
    """

    def __init__(self, busy_w: float, counter: Counter | None = None) -> None:
        self._busy_w = busy_w
        self._counter = counter
        self._began_j = 0.0
        self._joules = 0.0
        self._seconds = 0.0
        self._busy_s = 0.0
        self.source = MODELLED if counter is None else MEASURED

    @property
    def watts(self) -> float:
        """Mean over all passes measured so far; the set number before."""
        return self._joules / self._seconds if self._seconds > 0 else self._busy_w

    @property
    def total_joules(self) -> float:
        """Of all passes so far."""
        return self._busy_w * self._busy_s if self._counter is None else self._joules

    def begin(self) -> None:
        """A pass begins."""
        if self._counter is not None:
            self._began_j = self._counter()

    def end(self, seconds: float) -> None:
        """It has taken so long."""
        self._busy_s += seconds
        if self._counter is not None:
            self._joules += max(0.0, self._counter() - self._began_j)
            self._seconds += seconds

    def joules(self, seconds: float) -> float:
        """Of a pass that took so long."""
        return self.watts * seconds


def find_gauge(device: torch.device, busy_w: float) -> PowerGauge:
    """The gauge of a device, with counters where it has them and they can be read."""
    try:
        counter = _gpu_counter(device) if device.type == "cuda" else _cpu_counter()
    except ImportError:
        counter = None
    except Exception as error:  # noqa: BLE001 - vendors' libraries raise what they like
        _log.warning("no energy counter can be read: %s", error)
        counter = None
    if counter is None:
        _log.info("energy is modelled: %g W while a pass runs", busy_w)
    return PowerGauge(busy_w, counter)


def _gpu_counter(device: torch.device) -> Counter:
    from zeus.device import get_gpus  # noqa: PLC0415 - an optional package

    gpus, index = get_gpus(), device.index or 0
    return lambda: gpus.get_total_energy_consumption(index) / 1e3


def _cpu_counter() -> Counter | None:
    from zeus.device import get_cpus  # noqa: PLC0415 - an optional package
    from zeus.device.cpu.rapl import rapl_is_available  # noqa: PLC0415

    if not rapl_is_available():
        return None
    cpus = get_cpus()

    def joules() -> float:
        return sum(
            cpus.get_total_energy_consumption(index).cpu_mj or 0.0 for index in range(len(cpus))
        ) / 1e3  # fmt: skip

    joules()  # that it can be read shows now, not in mid-answer
    return joules
