"""Measuring as on another device: what workers are told, and the target alone at the same pace."""

from __future__ import annotations

import time
from collections.abc import Iterator

from models.padding import pad

AS_IT_IS = "as it is"


def device_name(least_step_ms: float, least_pass_ms: float) -> str:
    """What figures say of the device they were measured on."""
    if not least_step_ms and not least_pass_ms:
        return AS_IT_IS
    return f"paced: {least_step_ms:g} ms a step, {least_pass_ms:g} ms a pass"


def paced_env(least_step_ms: float, least_pass_ms: float) -> dict[str, str]:
    """Settings of workers whose models take at least so long."""
    return {
        "E2SCI_LEAST_STEP_MS": str(least_step_ms), "E2SCI_LEAST_PASS_MS": str(least_pass_ms),
    }  # fmt: skip


def paced(tokens: Iterator[int], least_pass_ms: float) -> Iterator[int]:
    """The tokens, each at least so long after the one before (`models.padding`)."""
    while True:
        began = time.perf_counter()
        try:
            token = next(tokens)
        except StopIteration:
            return
        pad(began, least_pass_ms)
        yield token
