"""Decoding methods, one file each: acceptance rule, pace and control, by name."""

from __future__ import annotations

from decoding.methods import plc, plc_literal, sd
from decoding.methods.base import Method

__all__ = ["Method", "find", "names"]

_METHODS: dict[str, Method] = {
    method.name: method for method in (sd.METHOD, plc.METHOD, plc_literal.METHOD)
}


def names() -> tuple[str, ...]:
    """Names of all methods, in the order they are offered."""
    return tuple(_METHODS)


def find(name: str) -> Method | None:
    """The method of that name, or None."""
    return _METHODS.get(name)
