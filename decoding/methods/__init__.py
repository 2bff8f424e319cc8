"""Decoding methods, one file each: acceptance rule, pace and control, by name.

A name may carry parameters after colons. A whole number is the window of a method in lockstep,
whatever the controller says: `sd:6`. A number with a decimal point is the threshold of a lossy
method in nats, the base of it where credit moves it: `fsd:0.25`, `e2sci:0.1`, `fsd:0.25:6`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from math import log

from decoding.methods import auto, e2sci, fsd, pipespec, plc, plc_literal, sd
from decoding.methods.base import Method
from decoding.methods.paces import Lockstep
from decoding.pacing import MAX_LOCKSTEP_WINDOW

__all__ = ["Method", "find", "names", "need_middle"]

_METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        auto.METHOD, auto.CHAIN, sd.METHOD, plc.METHOD, plc_literal.METHOD, fsd.METHOD, fsd.AHEAD,
        *e2sci.METHODS, *pipespec.METHODS,
    )
}  # fmt: skip

_WINDOW = re.compile(r"[1-9][0-9]?")
_THRESHOLD = re.compile(r"0\.[0-9]{1,6}")


def names() -> tuple[str, ...]:
    """Names of all methods, in the order they are offered."""
    return tuple(_METHODS)


def need_middle(names: Iterable[str]) -> bool:
    """Whether some of these methods draft by a middle worker."""
    return any(method.inner for name in names if (method := find(name)) is not None)


def find(name: str) -> Method | None:
    """The method of that name, or None; with `:T` the threshold is T, 0.0 … ln 2, and with `:W`
    the window is W, 1 … `MAX_LOCKSTEP_WINDOW`."""
    base, *parameters = name.split(":")
    method = _METHODS.get(base)
    if method is None or not parameters:
        return method
    method = replace(method, name=name)
    if _THRESHOLD.fullmatch(parameters[0]):
        threshold = float(parameters.pop(0))
        if method.lossless or threshold > log(2.0):
            return None
        method = replace(method, threshold=threshold)
    if parameters:
        window = parameters.pop(0)
        if not isinstance(method.pace, Lockstep) or not _WINDOW.fullmatch(window):
            return None
        if int(window) > MAX_LOCKSTEP_WINDOW:
            return None
        method = replace(method, pace=Lockstep(int(window)))
    return None if parameters else method
