"""Decoding methods, one file each: acceptance rule, pace and control, by name.

`NAME:W`, for a method in lockstep, is that method with windows of W tokens whatever the controller
says: `sd:6`.
"""

from __future__ import annotations

from dataclasses import replace

from decoding.methods import plc, plc_literal, sd
from decoding.methods.base import Method
from decoding.methods.paces import Lockstep
from decoding.pacing import MAX_LOCKSTEP_WINDOW

__all__ = ["Method", "find", "names"]

_METHODS: dict[str, Method] = {
    method.name: method for method in (sd.METHOD, plc.METHOD, plc_literal.METHOD)
}


def names() -> tuple[str, ...]:
    """Names of all methods, in the order they are offered."""
    return tuple(_METHODS)


def find(name: str) -> Method | None:
    """The method of that name, or None. With `:W` the window is W, 1 … `MAX_LOCKSTEP_WINDOW`."""
    base, colon, window = name.partition(":")
    method = _METHODS.get(base)
    if not colon or method is None:
        return method
    if not isinstance(method.pace, Lockstep) or window not in _STATIC_WINDOWS:
        return None
    return replace(method, name=name, pace=Lockstep(int(window)))


_STATIC_WINDOWS = frozenset(str(window) for window in range(1, MAX_LOCKSTEP_WINDOW + 1))
