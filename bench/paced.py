"""Measuring as on another device: what workers are told, and the target alone at the same pace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bus.protocol.errors import ConfigurationError
from engines.padding import NO_PADDING, LeastTimes, Padding

AS_IT_IS = "as it is"
NONE, CONTENDED = "none", "contended"
"""Devices by name, beside `STEP,PASS`."""
STEP_COUNTS, PASS_COUNTS = "steps", "passes"


@dataclass(frozen=True, slots=True)
class Device:
    """Whose times steps and passes take.

    Attributes:
        name: what figures say of it.
        least_step_ms: of a draft step. least_passes: of target passes, by their tokens.
    """

    name: str = AS_IT_IS
    least_step_ms: float = 0.0
    least_passes: LeastTimes = NO_PADDING

    @property
    def padded(self) -> bool:
        return bool(self.least_step_ms or self.least_passes)

    def env(self, counts: Path | None = None) -> dict[str, str]:
        """Settings of workers whose models take at least so long.

        Args:
            counts: directory where they count padded steps and passes.
        """
        counting = {}
        if counts is not None and self.padded:
            counting = {
                "E2SCI_STEP_COUNTS": str(counts.resolve() / STEP_COUNTS),
                "E2SCI_PASS_COUNTS": str(counts.resolve() / PASS_COUNTS),
            }
        return {
            "E2SCI_LEAST_STEP_MS": f"{self.least_step_ms:g}",
            "E2SCI_LEAST_PASS_MS": str(self.least_passes), **counting,
        }  # fmt: skip


THIS_DEVICE = Device()


def short_name(device: str) -> str:
    """A device's name without its figures, where they are many."""
    return device.partition(":")[0] if "contended" in device else device


def split_paced(paced: str) -> tuple[str, ...]:
    """`none,8,60,contended` → `none`, `8,60`, `contended`.

    Raises:
        ConfigurationError: it is no such list.
    """
    parts, found = [part.strip() for part in paced.split(",")], []
    while parts:
        part = parts.pop(0)
        if part in (NONE, CONTENDED):
            found.append(part)
        elif parts:
            found.append(f"{_ms(part, paced):g},{_ms(parts.pop(0), paced):g}")
        else:
            raise _unreadable(paced)
    return tuple(dict.fromkeys(found))


def one_device(paced: str) -> str:
    """The only device of such a list.

    Raises:
        ConfigurationError: it is no such list, or has several.
    """
    found = split_paced(paced)
    if len(found) > 1:
        raise ConfigurationError(f"--paced {paced!r}: expected one device, got {len(found)}")
    return found[0]


def fixed_device(paced: str) -> Device:
    """`none` or `STEP,PASS` as `split_paced` gives it."""
    if paced == NONE:
        return THIS_DEVICE
    step_ms, pass_ms = map(float, paced.split(","))
    if not step_ms and not pass_ms:
        return THIS_DEVICE
    name = f"paced: {step_ms:g} ms a step, {pass_ms:g} ms a pass"
    return Device(name, step_ms, LeastTimes.parse(f"{pass_ms:g}"))


def paced(tokens: Iterator[int], padding: Padding) -> Iterator[int]:
    """The tokens of the target alone, each pass padded but the first, which runs the prompt."""
    first = True
    while True:
        began = time.perf_counter()
        try:
            token = next(tokens)
        except StopIteration:
            return
        if not first:
            padding.wait(began)
        first = False
        yield token


def _ms(text: str, paced: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 60_000:
        raise _unreadable(paced)
    return value


def _unreadable(paced: str) -> ConfigurationError:
    return ConfigurationError(
        f"--paced {paced!r}: expected STEP,PASS in ms, such as 24,180, or {NONE}, or {CONTENDED}; "
        "comma between several"
    )
